"""The text model of a multimodal checkpoint: states and answers are those of transformers, and a
head for it is made and proved with the commands of any other."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from drafthead.doctor import engine as doctor_engine
from drafthead.fsio import read_json
from drafthead.recipe import parse_recipe
from drafthead.run import execute
from drafthead.rundir import RunDir
from drafthead.serve import serve_plan
from drafthead.targets import load_target
from tests import wrappers
from tests.reference.transformers_twin import TransformersTwin
from tests.vllm.engines import counter, eagle3, engine, norms_write_in_place
from tests.vllm.models import write_head
from tests.vllm.runs import recipe_for
from tests.vllm.test_any_target import AUX, check_answers, check_states, inspected

STANDINS = Path(__file__).parents[1] / "standins"
# As who serves text alone says it. Else vLLM wants a processor of images, which no tiny has.
TEXT_ONLY = {"language_model_only": True}


@pytest.fixture(autouse=True)
def torchvision(monkeypatch):
    """A stand-in for it, here and in vLLM's processes, where there is none."""
    try:
        importlib.metadata.version("torchvision")
        yield
    except importlib.metadata.PackageNotFoundError:
        monkeypatch.syspath_prepend(STANDINS)
        path = [str(STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
        yield
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("kind", "k", "bringer"),
    [("mistral3", 1, "vllm"), ("qwen3_vl", 3, "vllm"), ("gemma3", 3, "drafthead")],
)
def test_states_and_answers(kind, k, bringer, tmp_path, monkeypatch, capsys):
    target = wrappers.write(kind, tmp_path / "target", embedding_scale=4.0)
    head = write_head(tmp_path / "head", target, aux_layers=AUX, repeats=True)
    twin = TransformersTwin(target, torch.float32)
    (architecture,) = load_target(target).architectures
    inspected(architecture, monkeypatch)
    norms_write_in_place(monkeypatch)
    with engine(target, eagle3(head, k), **TEXT_ONLY) as llm:
        check_states(llm, twin)
        check_answers(llm, twin)
        accepted = counter(llm, "spec_decode_num_accepted_tokens")
        assert 10 < accepted < counter(llm, "spec_decode_num_draft_tokens")
    exec(
        doctor_engine._HOOK, {"architecture": architecture, "extra": []}
    )  # doctor's process, in this one
    assert f"hook {bringer}\n" in capsys.readouterr().out


def test_a_head_is_made_and_proved(tmp_path):
    target = wrappers.write("mistral3", tmp_path / "target", tied=False)
    recipe = parse_recipe(
        recipe_for(
            target,
            tmp_path,
            vocab={"size": 256},
            train={"row_tokens": 256, "epochs": 1},
            serve={"num_speculative_tokens": 2},
            verify={"max_new_tokens": 16},
            engine={"extra": TEXT_ONLY},
        ),
        "test",
    )
    done = execute(recipe, tmp_path / "runs", last="verify", console=Console(quiet=True))
    assert done["capture"]["greedy_agreement"] == 1.0
    assert done["verify"]["lossless"] is True
    assert done["verify"]["prompts"] == 4
    run = RunDir(tmp_path / "runs" / "t")
    assert read_json(run.head / "config.json", "")["hidden_size"] == 64
    assert "--language-model-only" in serve_plan(recipe, tmp_path / "runs").command
