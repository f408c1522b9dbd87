"""The stage: a recipe's head on a run's states, new or going on from another one."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.errors import DraftheadError
from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.formats import Provenance
from drafthead.kinds import each_kind
from drafthead.recipe import Recipe, load_recipe, parse_recipe, with_options
from drafthead.run import stage_inputs
from drafthead.rundir import RunDir
from drafthead.states import Sample, StateWriter, StoreMeta
from drafthead.targets import load_target
from drafthead.train.stage import check_start, from_head, make_task, train
from drafthead.vocab import save_vocab
from tests.refused import refused

CONSOLE = Console(file=io.StringIO())
AUX = (1, 2)


@pytest.fixture(scope="module")
def prepared(llama, tmp_path_factory) -> tuple[Recipe, RunDir]:
    """A run of the tiny Llama with random states and a vocabulary, ready to train."""
    target = load_target(llama)
    run = RunDir(tmp_path_factory.mktemp("runs") / "tiny")
    write_states(run.states, target)
    counts = torch.arange(target.vocab_size).numpy()
    save_vocab(run.vocab, counts, 128, target.eos_token_ids)
    recipe = parse_recipe(
        {
            "name": "tiny",
            "target": {"path": str(llama)},
            "prompts": {"sources": [{"path": "p.jsonl"}]},
            "train": {"epochs": 1, "row_tokens": 64},
        },
        "test",
    )
    return recipe, run


def write_states(path, target, width=None):
    g = torch.Generator().manual_seed(0)
    width = width or target.hidden_size
    meta = StoreMeta(AUX, target.num_layers, width, "bf16", 1, {"target": "tiny"})
    samples = [
        Sample(
            ids=torch.randint(0, target.vocab_size, (30,), generator=g, dtype=torch.int32),
            loss_mask=torch.arange(30) >= 10,
            states=torch.randn(29, 3, width, generator=g).bfloat16(),
            num_aux=2,
            prompt_len=10,
            conversation=f"c{number}",
            split="heldout" if number == 0 else "train",
        )
        for number in range(7)
    ]
    with StateWriter(path, meta) as writer:
        writer.submit(0, samples, {})


def test_trains_a_head_of_the_recipe_for_the_target(prepared):
    recipe, run = prepared
    summary = train(recipe, run, console=CONSOLE)
    assert summary["steps"] == 3
    loaded = load_head(run.train / "best")
    target = load_target(recipe.target.path)
    assert loaded.head.config.aux_layer_ids == AUX
    assert loaded.head.config.draft_vocab_size == 128
    assert loaded.read.provenance["target_fingerprint"] == target.fingerprint


def test_goes_on_from_a_head_of_either_format(prepared, tmp_path):
    recipe, run = prepared
    head = make_task(recipe, run, load_target(recipe.target.path)).head
    with torch.no_grad():
        head.fc.weight.fill_(0.25)
    for form in ("vllm", "speculators"):
        save_head(head, tmp_path / form, Provenance("x", "y", ("LlamaForCausalLM",)), format=form)
        changed = from_head(recipe, tmp_path / form)
        task = make_task(changed, run, load_target(recipe.target.path))
        assert (task.head.fc.weight == 0.25).all()
        assert task.head.fc.weight.dtype == torch.float32
        assert torch.equal(task.head.d2t, head.d2t)
        assert not task.own_embedding
    assert from_head(recipe, None) is recipe


def test_goes_on_from_a_dspark_head(prepared, tmp_path):
    recipe, run = prepared
    target = load_target(recipe.target.path)
    recipe = with_options(recipe, "head", {"kind": "dspark", "markov_rank": 8})
    first = make_task(recipe, run, target).head
    with torch.no_grad():
        first.fc.weight.fill_(0.25)
    DRAFTERS["dspark"].save(first, tmp_path / "first", Provenance("x"), k=3)
    given = from_head(recipe, tmp_path / "first")
    head = make_task(given, run, target).head
    assert (head.fc.weight == 0.25).all()
    assert head.config == first.config
    other = RunDir(tmp_path / "run")
    shutil.copytree(run.states, other.states)
    assert train(given, other, console=CONSOLE)["steps"] == 3
    assert drafter_of(other.train / "best").kind == "dspark"
    with pytest.raises(DraftheadError) as error:
        make_task(with_options(given, "head", {"kind": "eagle3", "markov_rank": 256}), run, target)
    assert error.value.field == "head.kind"


def test_a_head_with_an_embedding_of_its_own_keeps_it(prepared, tmp_path):
    recipe, run = prepared
    target = load_target(recipe.target.path)
    head = make_task(recipe, run, target).head
    own = torch.randn(target.vocab_size, target.hidden_size).bfloat16()
    save_head(head, tmp_path / "own", Provenance("x"), embedding=own)
    task = make_task(from_head(recipe, tmp_path / "own"), run, target)
    assert task.own_embedding
    assert torch.equal(task.embedding, own)


def test_a_head_for_other_layers_is_refused(prepared, tmp_path):
    recipe, run = prepared
    target = load_target(recipe.target.path)
    head = make_task(recipe, run, target).head
    head.config = replace(head.config, aux_layer_ids=(1, 3))
    save_head(head, tmp_path / "other", Provenance("x"))
    with refused("head.aux_layers", (1, 3), (1, 2)):
        make_task(from_head(recipe, tmp_path / "other"), run, target)


@pytest.mark.parametrize(
    ("section", "settings", "names"),
    [
        ("train", {"rows_per_step": 1}, "2 processes; 1 rows; train.rows_per_step"),
        ("train", {"track": ["wandb"]}, "train.track; pip install wandb"),
        ("train", {"start_from": "nowhere"}, "nowhere"),
        ("head", {"hidden_size": 48}, "head.hidden_size; 48"),
        ("train", {"row_tokens": 9999}, "9999 tokens; takes 2"),
        ("head", {"aux_layers": [1, 3]}, "head.aux_layers; [3]; [1, 2]"),
    ],
)
def test_mistakes_are_found_before_what_was_trained_is_thrown_away(
    prepared, monkeypatch, section, settings, names
):
    recipe, run = prepared
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "wandb", None)
    captured = recipe.model_copy(
        update={"capture": recipe.capture.model_copy(update={"aux_layers": list(AUX)})}
    )
    check_start(captured, run)
    with refused(*names.split("; ")):
        check_start(with_options(captured, section, settings), run)


def test_steps_are_as_many_as_help_the_head_that_is_gone_on_from(prepared, tmp_path):
    recipe, run = prepared
    target = load_target(recipe.target.path)
    task = make_task(recipe, run, target)
    assert task.settings.ttt_steps == 3
    task.head.config = replace(task.head.config, norm_output=False)
    save_head(task.head, tmp_path / "bare", Provenance("x"))
    given = from_head(recipe, tmp_path / "bare")
    assert make_task(given, run, target).settings.ttt_steps == 5
    inputs = lambda **serve: stage_inputs(with_options(found, "serve", serve))["train"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    found = with_options(given, "prompts", {"sources": [{"path": str(tmp_path / "p.jsonl")}]})
    assert inputs(num_speculative_tokens=4) != inputs(num_speculative_tokens=6)
    explicit = with_options(given, "train", {"ttt_steps": 2})
    assert make_task(explicit, run, target).settings.ttt_steps == 2


def test_a_run_does_not_go_on_from_what_it_will_replace(prepared):
    recipe, run = prepared
    with refused("train/best"):
        check_start(from_head(recipe, run.train / "best"), run)


def test_states_of_another_width_are_refused(prepared, tmp_path):
    recipe, _ = prepared
    target = load_target(recipe.target.path)
    run = RunDir(tmp_path)
    write_states(run.states, target, width=48)
    with refused("states", 48):
        make_task(recipe, run, target)


def test_what_was_deleted_is_made_again_by_the_command_that_is_named(prepared, tmp_path):
    recipe, made = prepared
    run = RunDir(tmp_path)
    shutil.copytree(made.root, run.root, dirs_exist_ok=True)
    for stage in ("capture", "vocab"):
        run.finish(stage, {}, {})
    (run.vocab / "vocab.safetensors").write_bytes(b"half a file")
    with refused("vocab.safetensors", "drafthead vocab RECIPE"):
        check_start(recipe, run)
    assert run.finished("vocab", {}) is None
    assert run.finished("capture", {}) == {}
    shutil.copytree(made.vocab, run.vocab, dirs_exist_ok=True)
    shutil.rmtree(run.states)
    with refused("states", "drafthead capture RECIPE"):
        check_start(recipe, run)
    assert run.finished("capture", {}) is None
    run.finish("capture", {}, {})
    with refused("states", "drafthead capture RECIPE"):
        train(recipe, run, console=CONSOLE)
    assert run.finished("capture", {}) is None


def test_no_vocabulary_yet(prepared, tmp_path):
    recipe, _ = prepared
    target = load_target(recipe.target.path)
    run = RunDir(tmp_path)
    write_states(run.states, target)
    with refused("vocab.safetensors", "drafthead vocab RECIPE"):
        make_task(recipe, run, target)


def test_two_processes_of_torchrun_train_a_head_of_each_kind(prepared, tmp_path):
    recipe, run = prepared
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    data["prompts"]["sources"][0]["path"] = str(prompts)
    data["train"] |= {"rows_per_step": 2, "anchors": 1.0}
    data |= {"capture": {"aux_layers": list(AUX)}, "head": {"kind": ["eagle3", "dspark"]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    copied = RunDir(tmp_path / "runs" / "tiny")
    shutil.copytree(run.states, copied.states)
    shutil.copytree(run.vocab, copied.vocab)
    jobs = each_kind(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "runs")
    for stage, inputs in stage_inputs(jobs["eagle3"][0]).items():
        if stage in ("generate", "capture", "vocab"):
            copied.finish(stage, inputs, {})
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "drafthead", "train", "recipe.yaml", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert list(summary) == ["eagle3", "dspark"]
    for kind, (_, place) in jobs.items():
        assert summary[kind]["steps"] == 1
        assert json.loads((place.train / "best.json").read_text())["steps"] == 1
        assert drafter_of(place.train / "best").kind == kind
        DRAFTERS[kind].load(place.train / "best")
