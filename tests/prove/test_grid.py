"""The grid's bookkeeping, with engines that only say what they were asked."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from drafthead.data.answers import Answer, write_part
from drafthead.fsio import read_json
from drafthead.head.acceptance import Acceptance
from drafthead.plan import Plan, Setting
from drafthead.prove.bench import _on_each_number_of_gpus, _vocabularies, bench, contest
from drafthead.prove.grid import measure, shared, time_grid
from drafthead.prove.pairing import Point, run_pairs, summarize, typical_steps
from drafthead.recipe import parse_recipe, with_options
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan
from tests.prove import crafted, made_run
from tests.prove.closed_loop import serve


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


def test_the_grid_is_every_k_at_every_load():
    asked = []
    base, one, three = (Engine(n, s, asked) for n, s in (("base", 0.2), ("k1", 0.1), ("k3", 0.4)))
    points = [Point(k, c, 0.0, 5) for k in (1, 3) for c in (1, 2)]
    found = list(time_grid(base, {1: one, 3: three}, PROMPTS, points, repeats=1, warmup=0))
    assert sorted((p.num_speculative_tokens, p.concurrency) for p, _ in found) == [
        (1, 1),
        (1, 2),
        (3, 1),
        (3, 2),
    ]
    for point, cell in found:
        assert cell["speedup"] == pytest.approx(2 if point.num_speculative_tokens == 1 else 0.5)
        assert cell["verdict"] == ("faster" if point.num_speculative_tokens == 1 else "slower")
        assert set(cell["by_source"]) == {"a", "b"}
        latency = cell["latency"]["base"]
        assert latency["between_outputs_s"] == pytest.approx({"p50": 0.2, "p99": 0.2})
        assert latency["tokens_per_s_of_a_user"] == pytest.approx({"p50": 5, "p1": 5})


class Started(Engine):
    """An engine that the grid starts itself."""

    def start(self):
        pass

    def wait_ready(self):
        return self

    def __exit__(self, *exc_info):
        pass


@pytest.mark.parametrize("at_once", [True, False])
def test_every_pair_is_counted_where_people_watch(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(
        "drafthead.prove.grid.running", lambda plan, over, log, name: Started(name, 0.1, [])
    )
    plan, console = Plan([], {}), Console(file=io.StringIO())
    points = [Point(k, c, 0.0, 5) for k in (1, 3) for c in (1, 2)]
    how = {"over": "engine", "repeats": 1, "warmup": 0, "at_once": at_once}
    grid = measure(plan, {1: plan, 3: plan}, PROMPTS, points, **how, logs=tmp_path, console=console)
    assert len(list(grid)) == 4
    shown = re.findall(r"(\d+) of (\d+) pairs", console.file.getvalue())
    assert shown[0][0] == "0"
    assert shown[-1][0] == shown[-1][1]


def test_engines_that_share_a_gpu_take_a_part_of_it_each():
    plan = Plan([Setting("model", "m", ""), Setting("gpu_memory_utilization", 0.9, "")], {})
    assert shared(plan, 3).args == {"model": "m", "gpu_memory_utilization": pytest.approx(0.3)}


def test_an_ended_bench_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    target = crafted.target(tmp_path / "target")
    run = RunDir(tmp_path / "r")
    crafted.head(run.head, target)
    none, ids = np.zeros(0, np.int32), np.array([1, 7], np.int32)
    answer = Answer("c", "s", "heldout", ids, np.zeros(2, bool), none, "stop", "")
    write_part(run.answers, 0, [answer], {})
    recipe = parse_recipe(
        {
            "name": "r",
            "target": {"path": str(target)},
            "prompts": {"sources": [{"path": "p.jsonl"}]},
            "bench": {"num_speculative_tokens": [1, 3], "concurrency": [1, 2, 4]},
        },
        "test",
    )
    asked = []
    ended = iter([3, None])

    def measure(base, drafted, prompts, points, **how):
        left = next(ended)
        for point in points:
            if point.num_speculative_tokens == 1:
                asked.append(point.concurrency)
                for k in drafted:
                    if left == 0:
                        raise KeyboardInterrupt
                    left = left and left - 1
                    yield (
                        replace(point, num_speculative_tokens=k),
                        made_run.cell(k, point.concurrency),
                    )

    monkeypatch.setattr("drafthead.prove.bench.measure", measure)
    console = Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        bench(recipe, run, console=console)
    assert asked == [1, 2]
    assert not run.bench_json.exists()
    bench(recipe, run, console=console)
    assert asked == [1, 2, 2, 4]  # the second had only one of its two k
    found = [
        (c["concurrency"], c["num_speculative_tokens"])
        for c in read_json(run.bench_json, "")["grid"]
    ]
    assert sorted(found) == [(c, k) for c in (1, 2, 4) for k in (1, 3)]
    assert not list(run.root.glob(".stages/cells-*"))


def test_other_drafters_that_were_measured_are_not_again_once_a_later_one_is_ended(
    tmp_path, monkeypatch
):
    recipe, run = made_run.make(tmp_path)
    none, ids = np.zeros(0, np.int32), np.array([1, 7], np.int32)
    answer = Answer("c", "s", "heldout", ids, np.zeros(2, bool), none, "stop", "")
    write_part(run.answers, 0, [answer], {})
    recipe = with_options(recipe, "bench", {"num_speculative_tokens": [3]})
    other = str(crafted.head(tmp_path / "other", tmp_path / "SmolLM2-135M-Instruct"))
    asked, ended = [], [True]

    def measure(base, drafted, prompts, points, **how):
        method = drafted[3].args["speculative_config"]["method"]
        asked.append(method)
        if method == "ngram" and ended.pop():
            raise KeyboardInterrupt
        yield points[0], made_run.cell(3, 1)

    monkeypatch.setattr("drafthead.prove.bench.measure", measure)
    how = {"heads": [other], "ngram": True, "console": Console(quiet=True)}
    with pytest.raises(KeyboardInterrupt):
        contest(recipe, run, **how)
    ended.append(False)
    assert set(contest(recipe, run, **how)) == {other, "ngram"}
    assert asked == ["eagle3", "ngram", "ngram"]
    assert not list(run.root.glob(".stages/cells-*"))


def test_a_report_made_before_other_drafters_were_measured_is_made_anew(tmp_path, monkeypatch):
    recipe, run = made_run.make(tmp_path)
    run.finish("report", {}, {})
    monkeypatch.setattr("drafthead.prove.bench._measure", lambda *_: [made_run.cell(3, 1, 0.5)])
    found = contest(recipe, run, heads=[], ngram=True, console=Console(quiet=True))
    assert found["ngram"]["verdict"] == "slower"
    assert run.finished("report", {}) is None


def test_a_row_of_the_draft_vocabulary_is_one_gpus_of_several(tmp_path, llama, monkeypatch):
    data = {"name": "r", "target": {"path": str(llama)}}
    recipe = parse_recipe(data | {"prompts": {"sources": [{"path": "p.jsonl"}]}}, "test")
    run = RunDir(tmp_path)
    crafted.head(run.head, crafted.target(tmp_path / "target"))
    monkeypatch.setattr("drafthead.prove.bench.by_vocabulary", lambda *_: {64: [[0.5]]})
    asked = []
    monkeypatch.setattr(
        "drafthead.prove.bench.row_seconds", lambda _h, rows, _n, **_: asked.append(rows) or 1e-9
    )
    rehearsal = SimpleNamespace(run=run, point=Point(3, 1, 0.0, 64))
    found = [_vocabularies(recipe, rehearsal, [[0.5]], gpus).row_s[1] for gpus in (1, 2)]
    assert found == [1e-9, 5e-10]
    assert asked == [crafted.DRAFT_VOCAB, crafted.DRAFT_VOCAB // 2]


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
