"""The grid's bookkeeping, with engines that only say what they were asked."""

import io

import numpy as np
import pytest
from rich.console import Console

from drafthead.data.answers import Answer, write_part
from drafthead.fsio import RunLock, read_json, write_json
from drafthead.head.acceptance import Acceptance
from drafthead.plan import Plan, Setting
from drafthead.prove.bench import _on_each_number_of_gpus, bench, contest
from drafthead.prove.grid import ALL, FIRST, REST, How, measure, shared
from drafthead.prove.paired_timing import Point, run_pairs, summarize, typical_steps
from drafthead.prove.proof import hash_folder, seal
from drafthead.prove.served import (
    as_served,
    drafts_by_load,
    recommended_k,
    served_k,
    with_headline,
)
from drafthead.recipe import parse_recipe, with_options
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan
from tests.prove import crafted
from tests.prove.closed_loop import serve
from tests.refused import refused

QUIET = Console(quiet=True)


class Engine:
    """Takes ``step_s`` a token, and drafts as many times as it writes tokens after the first."""

    def __init__(self, name, step_s, asked):
        self.name, self.step_s, self.asked = name, step_s, asked
        self.count = Acceptance()

    def counters(self):
        return self.count

    def generate(self, prompts, **how):
        self.asked.append((self.name, tuple(map(tuple, prompts)), how))
        assert how["prefix_cache"] is False
        limits = how["max_tokens"]
        if isinstance(limits, int):
            limits = [limits] * len(prompts)
        c, n = self.count, sum(limits) - len(limits)
        self.count = Acceptance(c.drafts + n, c.draft_tokens + n, [0])
        return serve(limits, how["concurrency"], first_s=self.step_s, step_s=self.step_s)


PROMPTS = [([1], "a"), ([2], "a"), ([3], "b")]


def test_every_engine_gets_each_block_in_turn():
    asked = []
    base, one, two = (Engine(n, s, asked) for n, s in (("base", 0.2), ("one", 0.1), ("two", 0.4)))
    point = Point(1, 2, 0.7, 5)
    first, second = run_pairs(base, [one, two], PROMPTS, point, repeats=1, warmup=1)
    assert all(len(prompts) == 2 for _, prompts, _ in asked[:3])  # as many as run at once
    timed = asked[3:]
    assert len(first) == len(second) == len(timed) // 3 >= 8
    for n in range(len(first)):
        block = timed[3 * n : 3 * n + 3]
        assert len({(prompts, how["seed"]) for _, prompts, how in block}) == 1
        order = ["base", "one", "two"]
        assert [name for name, _, _ in block] == order[n % 3 :] + order[: n % 3]
        assert first[n].base is second[n].base
        limits = first[n].limits
        assert limits == block[0][2]["max_tokens"]
        assert sum(limits) == 5 * len(first[n].sources)  # a whole answer to each prompt
        assert first[n].counters.drafts == sum(limits) - len(limits)
    assert len({how["seed"] for _, _, how in timed}) == len(first)


def test_a_source_of_one_pair_has_no_interval_hence_no_figures():
    base, drafted = (Engine(name, 0.1, []) for name in ("base", "drafted"))
    point = Point(1, 1, 0.0, 5)
    prompts = [([i], f"source {i}") for i in range(8)] + [([9], "source 0")]
    (blocks,) = run_pairs(base, [drafted], prompts, point, repeats=1, warmup=0)
    found = summarize(point, blocks)
    assert found["pairs_timed"] == 9
    assert set(found["by_source"]) == {"source 0"}


def step_pair(base_s, drafted_s):
    return {"base_step_s": base_s, "drafted_step_s": drafted_s}


def test_a_disturbed_minute_counts_little():
    both = [step_pair(0.004 * slow, 0.005 * slow) for slow in (1, 1, 2, 1, 3)]
    steps = typical_steps(both)
    assert steps["plain_steps"] == pytest.approx(1.25)
    one = [step_pair(0.004, 0.005)] * 9 + [step_pair(0.004, 0.05)]  # one side met it
    assert typical_steps(one)["drafted"] == pytest.approx(0.005 * 10 / 9.1)
    idle = step_pair(None, 0.005)  # answers of one token have no step
    assert typical_steps([*both, idle]) == steps
    assert typical_steps([idle])["plain_steps"] is None


class Started(Engine):
    """One that is started and ended; what happens to it is noted in ``asked`` too."""

    def start(self):
        self.asked.append((self.name, "start", None))

    def wait_ready(self):
        return self

    def close(self):
        self.asked.append((self.name, "end", None))

    def __exit__(self, *_):
        self.close()


SECONDS = {0: 0.2, 1: 0.16, 2: 0.1, 3: 0.12, 4: 0.25, 5: 0.3, 7: 0.05}
"""What a token takes by the number of drafts."""


@pytest.fixture
def engines(monkeypatch):
    """Engines that take ``SECONDS`` a token, a fifth less with drawn drafts, in the place of
    vLLM's; returns what they were asked: name, prompts or start or end, and how."""
    asked = []

    def running(plan, over, log, name):
        drafting = plan.args.get("speculative_config", {})
        k = drafting.get("num_speculative_tokens", 0)
        drawn = drafting.get("draft_sample_method") == "probabilistic"
        engine = Started(str(k), SECONDS[k] * (0.8 if drawn else 1), asked)
        engine.share = plan.args.get("gpu_memory_utilization")
        return engine

    monkeypatch.setattr("drafthead.prove.grid.running", running)
    return asked


def plan_of(k):
    drafting = [Setting("speculative_config", {"num_speculative_tokens": k}, "")] if k else []
    return Plan([Setting("model", "m", ""), *drafting], {})


def measured(points, at_once, tmp_path, share=ALL, console=None, prompts=PROMPTS):
    how = How("engine", repeats=1, warmup=0, at_once=at_once, together=True, share=share)
    drafted = {k: plan_of(k) for k in (1, 3)}
    console = console or Console(quiet=True)
    return measure(plan_of(0), drafted, prompts, points, how, logs=tmp_path, console=console)


def events(asked):
    return [f"{name} {what}" for name, what, _ in asked if what in ("start", "end")]


POINTS = [Point(k, c, 0.0, 5) for k in (1, 3) for c in (1, 2)]
ONCE = {
    3: ["0 start", "1 start", "3 start", "3 end", "1 end", "0 end"],
    2: ["0 start", "1 start", "1 end", "3 start", "3 end", "0 end"],
    1: [f"{k} {what}" for _ in range(2) for k in (0, 1, 3) for what in ("start", "end")],
}
"""How engines come and go, by how many memory holds."""


@pytest.mark.parametrize("at_once", ONCE)
def test_the_grid_is_every_k_at_every_load(engines, tmp_path, at_once):
    """However many engines memory holds, each pair is the same block of prompts on both."""
    cells = dict(measured(POINTS, at_once, tmp_path))
    assert set(cells) == set(POINTS)
    assert events(engines) == ONCE[at_once]
    for point, cell in cells.items():
        k = point.num_speculative_tokens
        assert cell["engines_at_once"] == at_once
        assert cell["speedup"] == pytest.approx(SECONDS[0] / SECONDS[k])
        assert cell["verdict"] == "faster"
        assert set(cell["by_source"]) == {"a", "b"}
        latency = cell["latency"]["base"]
        assert latency["between_outputs_s"] == pytest.approx({"p50": 0.2, "p99": 0.2})
        assert latency["tokens_per_s_of_a_user"] == pytest.approx({"p50": 5, "p1": 5})
        # Every answer of a pair is to the same prompts, block by block.
        assert cell["same_tokens"] == cell["answers"]
        for pair in cell["pairs"]:
            assert pair["base_tokens"] == pair["drafted_tokens"]


def test_one_engine_at_a_time_meets_each_block_once(engines, tmp_path):
    """A B A B: the first half of the blocks in the first turn, the others in the second, with the
    seeds that they would have side by side."""

    def seeds(name):
        return [how["seed"] for who, _, how in engines if who == name and how is not None]

    point = Point(1, 1, 0.7, 5)
    ((_, cell),) = measured([point], 1, tmp_path)
    turns = {name: seeds(name) for name in ("0", "1")}
    assert turns["0"] == turns["1"]
    assert len(turns["0"]) == cell["pairs_timed"]
    assert len(set(turns["0"])) == len(turns["0"])
    ends = [at for at, (who, what, _) in enumerate(engines) if (who, what) == ("0", "end")]
    first_turn = sum(who == "0" and how is not None for who, _, how in engines[: ends[0]])
    assert first_turn == -(-cell["pairs_timed"] // 2)
    engines.clear()
    ((_, cell),) = measured([point], 2, tmp_path)
    assert {name: seeds(name) for name in ("0", "1")} == turns


def test_the_chosen_k_is_timed_on_other_blocks(engines, tmp_path):
    prompts = [([n], "ab"[n % 2]) for n in range(30)]

    def asked_of(share):
        engines.clear()
        list(measured([Point(1, 1, 0.0, 5)], 2, tmp_path, share, prompts=prompts))
        return [one for who, (one, *_), how in engines if who == "1" and how is not None]

    first, rest = asked_of(FIRST), asked_of(REST)
    assert len(first) == 8
    assert not {*first} & {*rest}
    assert {*first} | {*rest} == {(n,) for n in range(30)}


@pytest.mark.parametrize("at_once", ONCE)
def test_every_pair_is_counted_where_people_watch(engines, tmp_path, at_once):
    console = Console(file=io.StringIO(), width=200)
    pairs = sum(
        cell["pairs_timed"] for _, cell in measured(POINTS, at_once, tmp_path, ALL, console)
    )
    assert f"{pairs} of {pairs} pairs" in console.file.getvalue()


def test_engines_that_share_a_gpu_take_a_part_of_it_each():
    plan = Plan([Setting("model", "m", ""), Setting("gpu_memory_utilization", 0.9, "")], {})
    assert shared(plan, 3).args == {"model": "m", "gpu_memory_utilization": pytest.approx(0.3)}


@pytest.fixture
def benched(tmp_path):
    """A recipe of other sections than the least, and its run with a head and one answer held
    out."""
    target = crafted.target(tmp_path / "target")
    run = RunDir(tmp_path / "r")
    crafted.head(run.head, target)
    none = np.zeros(0, np.int32)
    answers = [
        Answer(f"c{n}", "s", "heldout", np.array([1, n], np.int32), none > 0, none, "stop", "")
        for n in range(24)
    ]
    write_part(run.answers, 0, answers, {})

    def make(**sections):
        data = {"name": "r", "target": {"path": str(target)}} | sections
        return parse_recipe(data | {"prompts": {"sources": [{"path": "p.jsonl"}]}}, "test"), run

    return make


def prove(run, ks):
    proof = {"lossless": True, "served": {str(k): {"command": "c"} for k in ks}}
    about = {"format": "", "date": "", "claim": "c", "outcome": {"tokens": 1}, "drafthead": ""}
    record = {**about, **proof, "head": {"sha256": hash_folder(run.head)}}
    write_json(run.root / "proof.json", record | {"seal": seal(record)})


def test_where_none_is_named_five_k_are_timed_and_the_fastest_again(benched, engines):
    recipe, run = benched(bench={"warmup": 0, "concurrency": [1, 4]})
    summary = bench(recipe, run, console=QUIET)
    assert summary["num_speculative_tokens"] == 2
    result = read_json(run.bench_json, "")
    headline, *others = result["grid"]
    assert (headline["num_speculative_tokens"], headline["concurrency"]) == (2, 1)
    assert headline["pairs_timed"] == 16
    assert sorted((c["concurrency"], c["num_speculative_tokens"]) for c in others) == [
        *((1, k) for k in (1, 3, 4, 5)),
        *((4, k) for k in (1, 2, 3, 4, 5)),
    ]
    assert {cell["pairs_timed"] for cell in others} == {8}
    assert set(result["commands"]) == set("12345")
    # Nothing was proved yet: the default is served. Then the fastest of what is proved.
    assert served_k(recipe, run) == 3
    prove(run, [1, 2, 3, 4, 5])
    assert served_k(recipe, run) == recommended_k(recipe, run) == 2
    prove(run, [1, 3])
    assert served_k(recipe, run) == recommended_k(recipe, run) == 3
    assert with_headline(result, 3)["speedup"] == pytest.approx(0.2 / 0.12)
    assert with_headline(result, 9) == result


@pytest.mark.parametrize("heats", [[0.0, 0.7], [0.7, 0.0, 1.0]])
def test_how_drafts_are_drawn_is_measured_at_the_recipes_temperature(benched, engines, heats):
    recipe, run = benched(bench={"warmup": 0, "temperature": heats})
    assert as_served(recipe, run).serve.draft_sample_method == "greedy"  # nothing was measured
    prove(run, [1, 2, 3, 4, 5])
    assert bench(recipe, run, console=QUIET)["num_speculative_tokens"] == 2
    result = read_json(run.bench_json, "")
    drawn = [c for c in result["grid"] if c["draft_sample_method"] == "probabilistic"]
    if not heats[0]:
        assert drawn == []
        assert as_served(recipe, run).serve.draft_sample_method == "greedy"
        return
    assert [(c["num_speculative_tokens"], c["temperature"]) for c in drawn] == [(2, 0.7), (2, 1.0)]
    assert result["draft_sample_method"] == "probabilistic"
    assert "probabilistic" in result["commands"]["2"]
    assert result["speedup"] == pytest.approx(0.2 / 0.08)
    assert as_served(recipe, run).serve.draft_sample_method == "probabilistic"
    assert recommended_k(recipe, run) == 2
    named = with_options(recipe, "serve", {"draft_sample_method": "greedy"})
    assert as_served(named, run).serve.draft_sample_method == "greedy"


def test_the_headline_is_of_what_was_proved(benched, engines):
    recipe, run = benched(bench={"warmup": 0})
    prove(run, [4, 1])
    assert bench(recipe, run, console=QUIET)["num_speculative_tokens"] == 1


@pytest.mark.parametrize("ks", [[3, 1], [3]])
def test_named_k_are_timed_on_all_prompts(benched, engines, ks):
    recipe, run = benched(bench={"warmup": 0, "num_speculative_tokens": ks})
    assert bench(recipe, run, console=QUIET)["num_speculative_tokens"] == 3
    assert [cell["pairs_timed"] for cell in read_json(run.bench_json, "")["grid"]] == [24] * len(ks)


def test_a_k_that_was_only_tried_is_not_served(benched, engines):
    """`bench --k 7` is no candidate of the recipe, proved or not."""
    recipe, run = benched(bench={"warmup": 0})
    once = with_options(recipe, "bench", {"num_speculative_tokens": [7]})
    prove(run, [1, 2, 3, 4, 5])
    assert bench(once, run, console=QUIET)["num_speculative_tokens"] == 7
    assert recommended_k(recipe, run) is None
    assert served_k(recipe, run) == 3
    prove(run, [3, 7])
    assert served_k(recipe, run) == 3
    assert served_k(once, run) == 7  # a recipe that names it, and it was proved
    named = with_options(recipe, "serve", {"num_speculative_tokens": 6})
    assert served_k(named, run) == 6  # as the user says; the command warns of it


def test_an_earlier_versions_bench_is_refused_by_name(benched):
    recipe, run = benched()
    prove(run, [3])
    write_json(run.bench_json, {"num_speculative_tokens": 3, "grid": [{"speedup": 1.2}]})
    with refused("bench.json", "drafthead bench RECIPE --again"):
        served_k(recipe, run)


def test_figures_of_another_head_choose_nothing(benched, engines):
    recipe, run = benched(bench={"warmup": 0})
    bench(recipe, run, console=QUIET)
    config = run.head / "config.json"
    config.write_text(config.read_text() + " ")
    prove(run, [1, 2, 3])
    assert recommended_k(recipe, run) is None


def test_an_ended_bench_goes_on_with_what_is_missing(benched, engines, monkeypatch):
    recipe, run = benched(
        bench={"num_speculative_tokens": [1, 3], "concurrency": [1, 2, 4], "warmup": 0}
    )
    timed = []

    def stop_after_three(*arguments, **named):
        for point, cell in measure(*arguments, **named):
            if len(timed) == 3:
                raise KeyboardInterrupt
            timed.append(point)
            yield point, cell

    with monkeypatch.context() as patch:
        patch.setattr("drafthead.prove.bench.measure", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            bench(recipe, run, console=QUIET)
    assert not run.bench_json.exists()
    engines.clear()
    bench(recipe, run, console=QUIET)
    again = {(who, how["concurrency"]) for who, _, how in engines if how is not None}
    done = {(str(point.num_speculative_tokens), point.concurrency) for point in timed}
    every = {(str(k), c) for k in (1, 3) for c in (1, 2, 4)}
    assert {one for one in again if one[0] != "0"} == every - done
    cells = read_json(run.bench_json, "")["grid"]
    assert {(str(c["num_speculative_tokens"]), c["concurrency"]) for c in cells} == every
    assert not list(run.root.glob(".stages/cells-*"))


def test_other_drafters_that_were_measured_are_not_again_once_a_later_one_is_ended(
    benched, engines, tmp_path, monkeypatch
):
    recipe, run = benched(bench={"num_speculative_tokens": [3], "warmup": 0})
    bench(recipe, run, console=QUIET)
    other = str(crafted.head(tmp_path / "other", tmp_path / "target"))
    label = f"{tmp_path.name}/other"  # no path of this machine
    asked, ended = [], [True]

    def stop_in_ngram(base, drafted, *arguments, **named):
        method = drafted[3].args["speculative_config"]["method"]
        asked.append(method)
        if method == "ngram" and ended.pop():
            raise KeyboardInterrupt
        yield from measure(base, drafted, *arguments, **named)

    monkeypatch.setattr("drafthead.prove.bench.measure", stop_in_ngram)
    how = {"heads": [other], "ngram": True, "console": QUIET}
    with pytest.raises(KeyboardInterrupt):
        contest(recipe, run, **how)
    ended.append(False)
    assert set(contest(recipe, run, **how)) == {label, "ngram"}
    assert asked == ["eagle3", "ngram", "ngram"]
    assert not list(run.root.glob(".stages/cells-*"))


def test_other_drafters_are_measured_at_the_headlines_k(benched, engines):
    recipe, run = benched(bench={"warmup": 0})
    bench(recipe, run, console=QUIET)
    run.report_html.touch()
    run.finish("report", {}, {})
    found = contest(recipe, run, heads=[], ngram=True, console=QUIET)
    assert found["ngram"]["verdict"] == "faster"
    assert run.finished("report", {}) is None  # it lacks them
    (cell,) = read_json(run.bench_json, "")["beside"]["ngram"]["grid"]
    assert cell["num_speculative_tokens"] == 2
    with RunLock(run.root), refused(run.root):
        contest(recipe, run, heads=[], ngram=True, console=QUIET)


def test_each_number_of_gpus_has_plans_of_its_own(llama):
    recipe = parse_recipe(
        {
            "name": "r",
            "target": {"path": str(llama)},
            "prompts": {"sources": [{"path": "p.jsonl"}]},
        },
        "test",
    )
    assert _on_each_number_of_gpus(recipe) == [recipe]
    spread = _on_each_number_of_gpus(
        with_options(recipe, "bench", {"tensor_parallel_size": [1, 2]})
    )
    sizes = [engine_plan(r, head=None).args.get("tensor_parallel_size", 1) for r in spread]
    assert sizes == [1, 2]


def test_drafts_by_load_are_the_fastest_at_each():
    def cell(k, requests, speedup, **more):
        alike = {"temperature": 0.0, "max_new_tokens": 64, "tensor_parallel_size": 1}
        own = {"num_speculative_tokens": k, "concurrency": requests, "compared_speedup": speedup}
        return alike | own | more

    cells = [cell(7, 1, 2.0), cell(3, 1, 1.8), cell(7, 16, 1.1), cell(3, 16, 1.4)]
    assert drafts_by_load(cells, {3, 7}) == [[1, 7], [2, 3]]
    cells += [cell(7, 64, 0.6), cell(3, 64, 0.9), cell(7, 64, 3.0, temperature=1.0)]
    assert drafts_by_load(cells, {3, 7}) == [[1, 7], [2, 3], [17, 0]]
    assert drafts_by_load(cells, {7}) == [[1, 7], [17, 0]]  # 3 was not proved
    assert drafts_by_load(cells[:2], {3, 7}) == []  # one load
    assert drafts_by_load(cells[:4], {7}) == []  # 7 at any load
