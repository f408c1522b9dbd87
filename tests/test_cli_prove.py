"""verify and bench on the command line: each option becomes a field of the recipe."""

import json

import pytest
from typer.testing import CliRunner

from drafthead.cli import app
from tests.refused import refused

RECIPE = """\
name: r
target: {path: target}
prompts: {sources: [{path: p.jsonl}]}
bench: {prompts: 7, concurrency: [2]}
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Run a command whose stage is not run; returns the recipe that the stage would get."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    seen = {}

    def run_stage(name, recipe, runs, overwrite, again=False, kind=None):
        seen["recipe"] = recipe
        return {"stage": name}

    for module in ("cli_options", "cli_prove"):
        monkeypatch.setattr(f"drafthead.{module}.run_stage", run_stage)

    def run(*words):
        found = CliRunner().invoke(app, [words[0], "r.yaml", *words[1:], "--json"])
        if found.exception and not isinstance(found.exception, SystemExit):
            raise found.exception
        return seen.get("recipe"), json.loads(found.stdout)

    return run


def test_options_of_verify(given):
    words = "--k 1,2,7 --concurrency 64 --prompts 2000 --prefix-cache --max-num-batched-tokens 64"
    recipe, result = given("verify", *words.split(), "--samples", "500", "--mixed-lengths")
    assert result == {"stage": "verify"}
    section = recipe.verify
    assert section.num_speculative_tokens == [1, 2, 7]
    assert (section.concurrency, section.prompts, section.samples) == (64, 2000, 500)
    assert (section.prefix_cache, section.mixed_lengths) == (True, True)
    assert section.max_num_batched_tokens == 64


def test_options_of_bench(given):
    words = "--k 1,3 --concurrency 1,16 --temperature 0,0.7 --tensor-parallel 1,2 --over http"
    sets = ("--set", "code=c.jsonl", "--set", "m.jsonl")
    recipe, _ = given("bench", *words.split(), *sets, "--max-new-tokens", "64,256")
    section = recipe.bench
    assert (section.num_speculative_tokens, section.max_new_tokens) == ([1, 3], [64, 256])
    assert (section.concurrency, section.temperature) == ([1, 16], [0.0, 0.7])
    assert (section.tensor_parallel_size, section.over) == ([1, 2], "http")
    assert [(s.name, s.path) for s in section.sources] == [("code", "c.jsonl"), (None, "m.jsonl")]
    assert section.prompts == 7
    recipe, _ = given("bench")
    assert (recipe.bench.concurrency, recipe.bench.sources) == ([2], None)


def test_a_value_that_is_none_is_named(given):
    with refused("command line", "bench.temperature.1", "'warm'"):
        given("bench", "--temperature", "0,warm")


def test_other_drafters_come_after_the_bench(given, monkeypatch, tmp_path):
    """Other heads are fetched and looked at first."""
    called, looked = {}, []

    def contest(recipe, run, *, heads, ngram, console):
        called.update(heads=heads, ngram=ngram, run=str(run.root))
        return {"ngram": {"speedup": 1.2}}

    def look_at(recipe, head, target):
        looked.append(head)
        return [], []

    monkeypatch.setattr("drafthead.prove.bench.contest", contest)
    monkeypatch.setattr("drafthead.head.checkpoint.head_folder", lambda head: tmp_path / head)
    monkeypatch.setattr("drafthead.serve.look_at", look_at)
    monkeypatch.setattr("drafthead.targets.recipe_target", lambda recipe: None)
    _, result = given("bench", "--head", "o/a", "--head", "o/b", "--baseline", "ngram")
    assert called == {"heads": ["o/a", "o/b"], "ngram": True, "run": "runs/r"}
    assert looked == [tmp_path / "o/a", tmp_path / "o/b"]
    assert result == {"stage": "bench", "beside": {"ngram": {"speedup": 1.2}}}
