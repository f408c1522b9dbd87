"""A real server: asked by streaming, timed, and diagnosed."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from drafthead.capture.plan import make_plan
from drafthead.data.answers import Answer, write_part
from drafthead.errors import DraftheadError
from drafthead.fsio import write_json
from drafthead.prove.live_server import conclude, observe
from drafthead.prove.paired_timing import Point, run_pairs, summarize
from drafthead.prove.server import Client, ServerProcess
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan
from tests.prove import crafted

KNOWN = [[1, 7, 50], [1, 7, 150], [1, 7, 203]]  # repeats, alternates, rings


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"word {i}"}) + "\n" for i in range(20)))
    return parse_recipe(
        {
            "name": "r",
            "target": {"path": str(crafted.target(folder / "target"))},
            "prompts": {"sources": [{"path": str(prompts)}], "heldout": 3},
            "engine": {"dtype": "float32", "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 4},
            "bench": {"max_new_tokens": 25},
        },
        "test",
    )


@pytest.fixture(scope="module")
def head(recipe, tmp_path_factory):
    return crafted.head(tmp_path_factory.mktemp("h") / "head", Path(recipe.target.path))


@pytest.fixture(scope="module")
def server(recipe, head, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    process = ServerProcess(engine_plan(recipe, head=head), log=log, name="server")
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_API_KEY", "of another server")  # which is none of this one's
            client = stack.enter_context(process)
        yield client


def made_run(folder, recipe, head, prompts, predicted):
    """A run whose held-out prompts are ``prompts``: conversation -> token ids."""
    run = RunDir(folder / recipe.name)
    answers = [
        Answer(name, "s", "heldout", *arrays(ids), np.zeros(0, np.int32), "stop", "")
        for name, ids in prompts.items()
    ]
    write_part(run.answers, 0, answers, {})
    run.head.symlink_to(head)
    heldout = [{"k": len(predicted), "acceptance_by_position": predicted}]
    write_json(run.train / "best.json", {"heldout": heldout})
    return run


def arrays(ids):
    return np.array(ids, np.int32), np.zeros(len(ids), bool)


def test_streaming_gives_the_ids_and_the_counters_of_the_engine(server):
    before = server.counters()
    answers = server.generate(KNOWN, max_tokens=[21, 21, 4], concurrency=2)
    assert [c.ids for c in answers.completions] == [
        [50] * 21,
        [151, 150] * 10 + [151],
        [204, 205, 203, 204],
    ]
    assert server.counters().since(before).accepted == [15, 5, 5]
    for completion in answers.completions:
        assert 0 < completion.first_token_s <= completion.seconds <= answers.wall_s
        assert completion.finish_reason == "length"
    with pytest.raises(DraftheadError, match="maximum context length"):
        server.generate([[1] * 600], max_tokens=5)
    with pytest.raises(DraftheadError, match="is a vLLM server there"):
        Client("http://127.0.0.1:9").counters()


def test_pairs_are_timed_over_http(server):
    base = Client(server.url, "again")  # the same server twice: the ratio must include 1
    prompts = [(ids, "s") for ids in KNOWN]
    point = Point(3, 1, 0.0, 25)
    (blocks,) = run_pairs(base, [server], prompts, point, repeats=2, warmup=1)
    cell = summarize(point, blocks)
    assert cell["same_tokens"] == cell["answers"] == 9
    assert cell["acceptance_by_position"][0] == pytest.approx(18 / 42)
    assert cell["latency"]["drafted"]["per_later_token_s"]["p99"] > 0
    point = Point(3, 2, 0.0, 25)  # answers of 13, 25, 25, 25 and 12 tokens of each kind
    prompts = list(zip(KNOWN, ("repeats", "alternates", "rings"), strict=True))
    (blocks,) = run_pairs(base, [server], prompts, point, repeats=1, warmup=0)
    cell = summarize(point, blocks)
    assert cell["same_tokens"] == cell["answers"] == 5 * len(blocks)
    assert cell["acceptance_by_position"][0] == pytest.approx(72 / 167)


def test_a_good_server_and_each_fault(server, recipe, head, tmp_path):
    good = made_run(
        tmp_path / "good", recipe, head, dict(zip("abc", KNOWN, strict=True)), [18 / 42, 6 / 42]
    )
    facts = observe(server, recipe, good.root.parent)
    assert facts.probe.by_position == [18 / 42, 6 / 42, 6 / 42]
    assert {f.what: f.state for f in conclude(facts)}["acceptance"] == "ok"

    # The chats themselves end in a ring, where every draft is wrong; the states were captured one
    # layer lower than the head is served.
    plan = make_plan(recipe)
    chats = [chat for unit in plan.units for chat, split in unit if split == "heldout"]
    said = {chat.id: plan.template.encode(chat.opening)[0] for chat in chats}
    bad = made_run(tmp_path / "bad", recipe, head, said, [0.7, 0.5])
    write_json(bad.states / "meta.json", {"aux_layers": [2, 3, 4]})
    facts = observe(server, recipe, bad.root.parent)
    assert facts.template_agrees is True
    assert (facts.head_aux_layers, facts.trained_aux_layers) == ([1, 2, 3], [2, 3, 4])
    found = {f.what: f for f in conclude(facts)}
    assert found["acceptance"].state == "fault"

    other = {name: ids[:-1] for name, ids in said.items()}  # as without a generation prompt's end
    facts = observe(server, recipe, made_run(tmp_path / "t", recipe, head, other, [0]).root.parent)
    assert {f.what: f.state for f in conclude(facts)}["chat template"] == "fault"
