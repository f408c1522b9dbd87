"""verify and bench with the real engine, on a target and head whose every token is known."""

import copy
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from drafthead.data.answers import Answer, write_part
from drafthead.errors import ClaimFailed
from drafthead.fsio import read_json, write_json
from drafthead.head.acceptance import Acceptance
from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.formats import Provenance
from drafthead.prove.bench import bench, contest
from drafthead.prove.engine import EngineProcess
from drafthead.prove.numeric_noise import TIE
from drafthead.prove.proof import hash_folder, read_proof
from drafthead.prove.verify import verify
from drafthead.recipe import parse_recipe, with_options
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan
from tests.prove import crafted
from tests.refused import refused

QUIET = Console(quiet=True)
PROMPTS = {"repeats": [1, 7, 50], "alternates": [1, 7, 150], "rings": [1, 7, 203]}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = crafted.target(tmp_path_factory.mktemp("crafted") / "target")
    # Greedy stays as it is; sampled, the partner has about half of the probability.
    return _change_lm_head(folder, lambda lm_head: lm_head.mul_(0.1))


@pytest.fixture(scope="module")
def recipe(target):
    data = {
        "name": "r",
        "target": {"path": str(target)},
        "prompts": {"sources": [{"path": "p.jsonl"}]},
        "engine": {"dtype": "float32", "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 4},
        "serve": {"num_speculative_tokens": 3},
        "verify": {"max_new_tokens": 24, "mixed_lengths": True, "samples": 40},
        "bench": {"max_new_tokens": [25, 13], "warmup": 1, "concurrency": [1, 2]},
    }
    return parse_recipe(data, "test")


@pytest.fixture(autouse=True, scope="module")
def kept():
    """The first two engines, the target alone and with its head, stay for the tests that follow:
    starting engines is most of this file's time. By what they were started with."""
    start, wait_ready, close, counters = (
        getattr(EngineProcess, name) for name in ("start", "wait_ready", "close", "counters")
    )
    idle: dict[str, EngineProcess | None] = {}

    def begun(self):
        drafting = dict(self.args.get("speculative_config") or {})
        if "model" in drafting:
            drafting["model"] = hash_folder(Path(drafting["model"]))
        patches = os.environ.get("DRAFTHEAD_SKIP_PATCHES") if drafting else None
        self.key = json.dumps([self.args | {"speculative_config": drafting}, self.env, patches])
        self.before = Acceptance()
        if not (other := idle.get(self.key)):
            return start(self)
        idle[self.key] = None
        self._child, self.info = other._child, other.info
        self.before = counters(self)
        return self

    def ready(self):
        if self._child is None:
            self.start()
        return self if self.info else wait_ready(self)

    def ended(self):
        if self._child and self.info and (self.key in idle or len(idle) < 2):
            idle[self.key] = copy.copy(self)
            self._child = None
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineProcess, "start", begun)
        patch.setattr(EngineProcess, "wait_ready", ready)
        patch.setattr(EngineProcess, "close", ended)
        patch.setattr(EngineProcess, "counters", lambda self: counters(self).since(self.before))
        yield
    for engine in filter(None, idle.values()):
        engine.close()


@pytest.fixture
def run(tmp_path, target):
    run = RunDir(tmp_path / "r")
    answers = [
        Answer(f"c{i}", name, "heldout", *_arrays(ids), np.zeros(0, np.int32), "stop", "")
        for i, (name, ids) in enumerate(PROMPTS.items())
    ]
    write_part(run.answers, 0, answers, {})
    crafted.head(run.head, target)
    return run


def _arrays(ids):
    return np.array(ids, np.int32), np.zeros(len(ids), bool)


def test_verify_proves_and_signs_off(recipe, run):
    console = Console(file=io.StringIO())
    summary = verify(recipe, run, console=console)
    # Three prompts and the same at mixed lengths, and 40 answers at three contexts: on two engines.
    assert f"{2 * (6 + 120)} of {2 * (6 + 120)} answers" in console.file.getvalue()
    assert summary == {
        "lossless": True,
        "prompts": 6,
        "identical": 6,
        "ties": 0,
        "differences": 0,
        "unprotected": [],
    }
    assert read_json(run.verify_json, "")["tokens"] > 3 * 24
    proof = read_proof(run)
    assert proof["lossless"] is True
    sampled = proof["outcome"]["sampled"]
    assert (sampled["contexts"], sampled["samples"]) == (3, 40)
    assert sampled["p_value"] > 0.001
    assert proof["head"]["sha256"].keys() == {"config.json", "model.safetensors"}
    config = run.head / "config.json"
    config.write_text(config.read_text() + " ")
    with refused("proof.json", "config.json", field="head"):
        read_proof(run)


def test_answers_that_nothing_was_drafted_for_prove_nothing(recipe, run):
    short = with_options(recipe, "verify", {"max_new_tokens": 1, "mixed_lengths": False})
    with refused("verify.max_new_tokens"):
        verify(short, run, console=QUIET)
    assert not run.verify_json.exists()
    assert not (run.root / "proof.json").exists()


def test_sampling_from_other_distributions_is_found(recipe, run, monkeypatch):
    """vLLM's own fault on the CPU (drafts divided by memory that nobody wrote), left unpatched."""
    monkeypatch.setenv("DRAFTHEAD_SKIP_PATCHES", "cpu_expand")
    update = {"verify": recipe.verify.model_copy(update={"mixed_lengths": False})}
    with refused("Sampling", "verify.json", error=ClaimFailed):
        verify(recipe.model_copy(update=update), run, console=QUIET)
    result = read_json(run.verify_json, "")
    assert (result["lossless"], result["identical"]) == (False, 3)
    assert ["cpu_expand" in line for line in result["unprotected"]] == [True]
    assert read_proof(run)["lossless"] is False


def test_bench_counts_what_is_known_beforehand(recipe, run):
    heldout = [
        {"k": 3, "acceptance_by_position": [0.5, 0.25, 0.125]},
        {"k": 5, "acceptance_by_position": [0.4, 0.2, 0.1, 0.1, 0.1]},
    ]
    write_json(run.train / "best.json", {"heldout": heldout})
    summary = bench(recipe, run, console=QUIET)
    result = read_json(run.bench_json, "")
    # 24 tokens after the first: 6 drafts of repeats (all right), 12 of alternates (the first
    # right), 24 of rings (all wrong).
    assert summary["acceptance_by_position"] == [18 / 42, 6 / 42, 6 / 42]
    assert summary["accepted_length"] == pytest.approx(1 + 30 / 42)
    assert result["predicted_acceptance_by_position"] == [0.5, 0.25, 0.125]
    single, double, *shorter = result["grid"]
    assert {s: f["accepted_length"] for s, f in single["by_source"].items()} == {
        "repeats": 4.0,
        "alternates": 2.0,
        "rings": 1.0,
    }
    assert (single["answers"], single["same_tokens"]) == (9, 9)
    assert single["pairs_timed"] >= 8
    assert double["concurrency"] == 2
    assert double["same_tokens"] == double["answers"] == 5 * double["pairs_timed"]
    assert all(p["base_tokens"] and p["drafted_tokens"] for p in double["pairs"])
    assert [(c["concurrency"], c["max_new_tokens"]) for c in shorter] == [(1, 13), (2, 13)]
    # 12 tokens after the first: half of the drafts of each.
    assert shorter[0]["accepted_length"] == pytest.approx(1 + 30 / 42)
    assert shorter[0]["drafts"] == single["drafts"] / 2
    low, high = summary["speedup_ci95"]
    assert low <= summary["speedup"] <= high
    assert (low > 1) == (summary["verdict"] == "faster")
    pairs = single["pairs"]
    tokens, seconds = (sum(p[f"base_{x}"] for p in pairs) for x in ("tokens", "s"))
    assert summary["base_tokens_per_s"] == pytest.approx(tokens / seconds)
    assert result["machine"]["cores"] >= 1


def test_other_drafters_are_measured_beside(recipe, run, tmp_path):
    other = tmp_path / "other"
    same = load_head(run.head).head
    save_head(same, other, Provenance(), format="speculators", dtype=torch.float32)
    section = recipe.bench.model_copy(
        update={"concurrency": [2], "max_new_tokens": [25], "prompts": 3}
    )
    found = contest_after(run, recipe.model_copy(update={"bench": section}), [str(other)])
    beside = read_json(run.bench_json, "")["beside"]
    label = f"{tmp_path.name}/other"  # no path of this machine
    assert set(found) == set(beside) == {label, "ngram"}
    # The same head in the other format. Two at once are answered with 13, 25, 25, 25 and 12 tokens:
    # 3 + 3 * 6 + 3 drafts of repeats, 6 + 3 * 12 + 6 of alternates, 12 + 3 * 24 + 11 of rings.
    assert found[label]["acceptance_by_position"] == [72 / 167, 24 / 167, 24 / 167]
    # What repeats is looked up too, what alternates and rings as well, once it has come round.
    assert found["ngram"]["accepted_length"] > 2
    assert beside["ngram"]["grid"][0]["concurrency"] == 2


def contest_after(run, recipe, heads):
    write_json(run.bench_json, {"grid": [], "num_speculative_tokens": 3})
    return contest(recipe, run, heads=heads, ngram=True, console=QUIET)


def _change_lm_head(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors["lm_head.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_tie_is_told_from_a_fault(recipe, run, tmp_path, monkeypatch):
    """The drafted engine is put on another target, so that the proof must fail: after 203 comes
    another token (a fault), after 150 one that the true target finds exactly as likely (a tie)."""

    def tied(lm_head):
        lm_head[400] = lm_head[151]

    def other(lm_head):
        tied(lm_head)
        lm_head[151] *= 0.9
        lm_head[[204, 299]] = lm_head[[299, 204]]

    def on(folder):
        update = {
            "target": recipe.target.model_copy(update={"path": str(folder)}),
            "verify": recipe.verify.model_copy(update={"mixed_lengths": False, "samples": 0}),
        }
        return recipe.model_copy(update=update)

    true = on(_change_lm_head(crafted.target(tmp_path / "true"), tied))
    false = on(_change_lm_head(crafted.target(tmp_path / "false"), other))

    def plan(recipe, *, head, target, **rest):
        return engine_plan(recipe if head is None else false, head=head, **rest)

    monkeypatch.setattr("drafthead.prove.verify.engine_plan", plan)
    with refused("1 of 3", 204, 299, error=ClaimFailed):
        verify(true, run, console=QUIET)
    result = read_json(run.verify_json, "")
    assert (result["identical"], result["ties"], result["differences"]) == (1, 1, 1)
    assert result["lossless"] is False
    (outcome,) = result["runs"]
    tie, fault = outcome["examined"]
    assert (tie["base_token"], tie["drafted_token"], tie["verdict"]) == (151, 400, TIE)
    assert tie["gap"] == pytest.approx(0, abs=1e-4)
    assert fault["position"] == 0
    assert outcome["noise"]["positions"] == outcome["tokens"]
    assert outcome["noise"]["largest"] < 1e-3
    assert outcome["noise"]["flips"] == 0
    assert read_proof(run)["lossless"] is False


def test_an_engine_that_cannot_start_or_dies_is_a_clear_error(target, tmp_path):
    args = {"model": str(tmp_path / "nowhere")}
    engine = EngineProcess(args, env={}, log=tmp_path / "log", name="target alone")
    with refused("target alone", "nowhere"):
        engine.__enter__()
    assert engine._child is None  # ended and waited for
    args = {"model": str(target), "enforce_eager": True, "kv_cache_memory_bytes": 1 << 50}
    engine = EngineProcess(args, env={}, log=tmp_path / "log", name="target alone")
    with refused("engine.kv_cache_memory_bytes"):
        engine.__enter__()
    engine = EngineProcess(args, env={}, log=tmp_path / "log", name="target alone")
    engine.start()
    os.kill(engine._child.process.pid, signal.SIGKILL)
    with refused("signal 9"):
        engine.wait_ready()
    engine.close()
