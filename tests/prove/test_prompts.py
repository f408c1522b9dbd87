"""Which prompts are put to the engines."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from drafthead.data.answers import Answer, write_part
from drafthead.data.template import Template
from drafthead.prove.prompts import (
    Prompt,
    heldout_prompts,
    many_prompts,
    own_prompts,
    timed_prompts,
)
from drafthead.prove.verify import begun_alike, workloads
from drafthead.recipe import parse_recipe, with_options
from drafthead.rundir import RunDir
from drafthead.targets import load_target
from tests.refused import refused
from tests.tiny import CHATML

CONSOLE = Console(quiet=True)


@pytest.fixture
def recipe(llama):
    return parse_recipe(
        {
            "name": "r",
            "target": {"path": str(llama)},
            "prompts": {"sources": [{"path": "p.jsonl"}]},
            "engine": {"max_model_len": 64},
        },
        "test",
    )


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "r")
    none = np.zeros(0, np.int32)
    answers = []
    for i, split in enumerate(["train", "heldout", "train", "heldout", "train"]):
        ids, mask = np.arange(1, 3 + i, dtype=np.int32), np.zeros(2 + i, bool)
        answers.append(Answer(f"c{i}", "s", split, ids, mask, none, "stop", ""))
    write_part(run.answers, 0, answers, {})
    return run


def test_more_prompts_than_held_out_takes_trained_ones(run):
    names = lambda prompts: [p.conversation for p in prompts]
    assert names(heldout_prompts(run, None)) == names(many_prompts(run, None)) == ["c1", "c3"]
    assert names(many_prompts(run, 1)) == ["c1"]
    assert names(many_prompts(run, 4)) == ["c1", "c3", "c0", "c2"]
    assert len(many_prompts(run, 99)) == 5


def test_sets_of_ones_own(recipe, run, llama, tmp_path):
    files = []
    for name in ("code", "maths"):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {i}"} for i in range(5)] + [{"prompt": "word " * 200}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"path": str(file), "name": name})
    options = {"sources": files, "prompts": 4, "max_new_tokens": 8}
    found = timed_prompts(with_options(recipe, "bench", options), run, load_target(llama), CONSOLE)
    assert [p.source for p in found] == ["code"] * 2 + ["maths"] * 2
    assert all(len(p.ids) <= 56 for p in found)
    with refused("bench.sources", "code.jsonl", 60, 64):
        longer = with_options(recipe, "bench", {**options, "max_new_tokens": 60})
        timed_prompts(longer, run, load_target(llama), CONSOLE)


def test_a_set_of_ones_own_is_asked_as_generate_asks_it(recipe, run, llama, tmp_path):
    """An empty system message was dropped here: other prompts than those trained on."""
    template = tmp_path / "target" / "chat_template.jinja"
    shutil.copytree(llama, template.parent)
    template.write_text(
        "{% if messages|length > 3 %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    user = {"role": "user", "content": "Hello"}
    file = tmp_path / "own.jsonl"
    sets = [[{"role": "system", "content": ""}, user], [user, user], [user] * 4]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in sets))
    options = {"sources": [{"path": str(file)}], "max_new_tokens": 4}
    target = load_target(template.parent)
    tokenizer = target.tokenizer()
    template = Template(tokenizer, target.eos_token_ids, "test")
    prompts, (counts,) = own_prompts(with_options(recipe, "bench", options), target, template)
    for prompt, messages in zip(prompts, sets[:2], strict=True):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    (left_out,) = counts.left_out.values()
    assert f"{file}, line 3" in left_out.examples[0]


def test_prompts_that_leave_no_room_are_no_proof(recipe, run, llama):
    """Nothing asked would be nothing that differs: lossless, by having tried nothing."""
    prompts = heldout_prompts(run, None)  # of 3 and 5 tokens
    (one,) = workloads(recipe, prompts, 4)
    assert [len(ids) for ids in one.prompts] == [3]
    with refused("engine.max_model_len", 2, 3):
        workloads(recipe, prompts, 3)
    short = with_options(recipe, "engine", {"max_model_len": 5})
    with refused("engine.max_model_len", "c3", 5):
        timed_prompts(short, run, load_target(llama), CONSOLE)


def test_prompts_from_cached_blocks(recipe, run):
    assert begun_alike([[1, 2, 3], [4]], 3) == [[1, 2, 3], [4], [1, 2, 4], [4, 1, 2]]
    options = {"prefix_cache": True, "mixed_lengths": True, "max_new_tokens": 60}
    found = workloads(with_options(recipe, "verify", options), heldout_prompts(run, None), 64)
    assert [w.name for w in found] == ["prompts", "cached prefixes", "mixed lengths"]
    for work in found[:2]:
        assert all(len(p) + n <= 64 for p, n in zip(work.prompts, work.max_tokens, strict=True))
    assert [len(w.prompts) for w in found] == [2, 4, 2]


def test_mixed_lengths_stay_within_the_model(recipe, run):
    """An answer that vLLM ends at the model's length is resumed after a tie: with no room left."""
    given = with_options(recipe, "verify", {"mixed_lengths": True})
    prompts = [Prompt(list(range(30)), f"c{i}", "s") for i in range(100)]
    mixed = workloads(given, prompts, 32)[1]
    assert {2, 5} < set(mixed.max_tokens)
    assert max(len(p) + n for p, n in zip(mixed.prompts, mixed.max_tokens, strict=True)) == 32


def test_options_are_checked_like_the_recipe(recipe):
    changed = with_options(recipe, "bench", {"concurrency": ["1", "16"], "prompts": None})
    assert (changed.bench.concurrency, changed.bench.prompts) == ([1, 16], 24)
    assert with_options(recipe, "bench", {"prompts": None}) is recipe
    with refused("command line", "bench.concurrency.1", "'x'"):
        with_options(recipe, "bench", {"concurrency": ["1", "x"]})
