"""With ``--json`` every command prints exactly one object on stdout, whatever becomes of it."""

import json
from pathlib import Path

import docs_pages
import pytest
from safetensors.torch import load_file, save_file

from drafthead.errors import ClaimFailed, DraftheadError
from drafthead.run import NAMES
from tests.prove import crafted, made_run
from tests.states import test_store

RECIPE = """\
name: r
target: {path: target}
prompts: {sources: [{path: p.jsonl}], heldout: 2}
vocab: {size: 64}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a recipe, a target and a finished run's files."""
    folder = tmp_path_factory.mktemp("made")
    crafted.target(folder / "target")
    crafted.head(folder / "runs" / "r" / "head", folder / "target")
    weights = folder / "runs" / "r" / "head" / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if not tensor.any():  # crafted by hand: what it does not need is zero
            tensors[name] = tensor + tensor.new_tensor(0.01)
    save_file(tensors, weights)
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "q{i}"}}\n' for i in range(40)))
    test_store.write(folder / "states")
    broken = folder / "broken"
    test_store.write(broken)
    next(broken.glob("*.safetensors")).write_bytes(b"x")
    (folder / "empty").mkdir()
    recipe, run = made_run.make(folder / "published")
    (folder / "published.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    run.report_html.write_text("report")
    return folder


@pytest.fixture(autouse=True)
def place(made, monkeypatch, quick_doctor):
    """Stages, imports and ModelOpt do no work here; all else is the real thing."""

    def stage(recipe, run, *, console):
        console.print("people read this")
        return {"made": recipe.name}

    monkeypatch.chdir(made)
    monkeypatch.setattr("drafthead.run._load", lambda _: stage)
    monkeypatch.setattr("os.execvpe", lambda *_: pytest.fail("vLLM's log follows on stdout"))
    monkeypatch.setattr("drafthead.quantize.quantize", lambda *_a, **_o: {"perplexity": 2.0})


FINE = {
    "drafthead init": ("target", "--out", "new.yaml"),
    "drafthead run": ("r.yaml",),
    **{f"drafthead {name}": ("r.yaml",) for name in NAMES},
    "drafthead quantize": ("target", "out", "--prompts", "p.jsonl"),
    "drafthead inspect": ("runs/r/head", "--target", "target"),
    "drafthead convert": ("runs/r/head", "converted"),
    "drafthead serve": ("r.yaml",),
    "drafthead publish": (
        *("published.yaml", "--repo", "a/b", "--dry-run", "--runs", "published/runs"),
    ),
    "drafthead doctor": ("r.yaml",),
    "drafthead states check": ("states",),
}


def test_every_command_is_tried_here():
    assert FINE.keys() == docs_pages.commands().keys()


@pytest.mark.parametrize("command", FINE)
def test_one_object(command, drafthead):
    if command.split()[1] in NAMES[1:]:
        drafthead("run", "r.yaml")  # a stage wants those before it
    code, out, err = drafthead(*command.split()[1:], *FINE[command], "--json")
    assert code == 0, err
    assert isinstance(json.loads(out), dict)


def test_export_tells_what_each_engine_makes_of_the_head(drafthead):
    drafthead("run", "r.yaml")
    code, out, err = drafthead("export", "r.yaml", "--for", "vllm,sglang,mlx", "--json")
    assert code == 0, err
    found = json.loads(out)["engines"]
    assert {name: can["serves"] for name, can in found.items()} == {
        "vllm": True,
        "sglang": True,
        "mlx": False,
    }
    folders = [Path(can["folder"]).name for can in found.values()]
    assert folders == ["head", "head", "head-mlx"]


def test_serve_names_the_commands_of_other_engines(drafthead):
    """mlx-vlm has no hook for a Llama."""
    found = json.loads(drafthead("serve", "r.yaml", "--json")[1])["other_engines"]
    assert list(found) == ["SGLang 0.5.23", "llama.cpp b11549", "TensorRT-LLM 1.4.0rc4"]
    printed = drafthead("serve", "r.yaml", "--print")[1]
    assert f"# {found['SGLang 0.5.23'][0]}" in printed


@pytest.mark.parametrize(
    ("args", "code", "key"),
    [
        (("run", "nope.yaml"), 2, "error"),
        (("train", "r.yaml", "--runs", "nowhere"), 2, "error"),
        (("init", "nowhere"), 2, "error"),
        (("inspect", "empty"), 2, "problems"),
        (("convert", "empty", "none"), 2, "error"),
        (("export", "r.yaml", "--for", "vllm,nosuch"), 2, "error"),
        (("states", "check", "broken"), 1, "faults"),
        (("doctor", "--url", "http://127.0.0.1:9"), 2, "error"),
        (("run",), 2, "error"),
        (("run", "r.yaml", "--form", "train"), 2, "error"),
        (("rnu", "r.yaml"), 2, "error"),
        (("quantize", "target", "out", "--prompts", "p.jsonl", "--samples", "0"), 2, "error"),
        (("states", "chekc"), 2, "error"),
    ],
)
def test_one_object_when_something_is_wrong(args, code, key, drafthead):
    found, out, _ = drafthead(*args, "--json")
    assert found == code
    assert json.loads(out)[key]


@pytest.mark.parametrize(("kind", "code"), [(DraftheadError, 2), (ClaimFailed, 1)])
def test_a_stage_that_fails_prints_its_error(kind, code, drafthead, monkeypatch):
    def stage(recipe, run, *, console):
        raise kind("the reason")

    monkeypatch.setattr("drafthead.run._load", lambda _: stage)
    found, out, err = drafthead("generate", "r.yaml", "--runs", f"runs-{code}", "--json")
    assert found == code
    assert json.loads(out) == {"error": "the reason"}
    assert "the reason" in err


def test_nothing_of_it_without_json(drafthead):
    code, out, err = drafthead("run", "nope.yaml")
    assert (code, out) == (2, "")
    assert "no such recipe" in err
    assert not Path("nope.yaml").exists()
