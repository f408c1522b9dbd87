"""From a trained head to what is served and published."""

import io
import json

import torch
from rich.console import Console

from drafthead.drafters.export import export, export_for
from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.formats import Provenance
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.targets import load_target
from tests import templates
from tests.heads import small_head
from tests.refused import refused


def recipe(llama, **sections):
    base = {
        "name": "x",
        "target": {"path": str(llama)},
        "prompts": {"sources": [{"path": "none.jsonl"}]},
        "serve": {"num_speculative_tokens": 5},
    }
    return parse_recipe({**base, **sections}, "recipe")


def trained(llama, run, **changes):
    """A head of the target's widths where training leaves it."""
    target = load_target(llama)
    head = small_head(
        **{
            "hidden_size": 64,
            "target_hidden_size": 64,
            "vocab_size": target.vocab_size,
            "aux_layer_ids": target.default_aux_layers(),
            "max_position_embeddings": target.max_position_embeddings,
            **changes,
        }
    )
    made = Provenance(target=str(llama), target_fingerprint=target.fingerprint, trained={"step": 7})
    save_head(head, run.train / "best", made)
    return load_head(run.train / "best").head


def test_both_formats_hold_the_trained_head(tmp_path, llama):
    run = RunDir(tmp_path / "run")
    best = trained(llama, run)
    made = export(recipe(llama, export={"speculators": True}), run, console=Console(quiet=True))
    for folder, format in ((run.head, "vllm"), (run.head_speculators, "speculators")):
        loaded = load_head(folder)
        assert loaded.read.format == format
        assert loaded.read.provenance["trained"] == {"step": 7}
        state = loaded.head.state_dict()
        assert all(torch.equal(state[name], t) for name, t in best.state_dict().items())
    config = json.loads((run.head_speculators / "config.json").read_text())["speculators_config"]
    assert config["proposal_methods"][0]["speculative_tokens"] == 5
    assert config["verifier"] == {"name_or_path": str(llama), "architectures": ["LlamaForCausalLM"]}
    # The first is published, with no path of this machine; of the other vLLM loads the target.
    assert load_head(run.head).read.provenance["target"] == llama.name
    assert made["parameters"] == sum(p.numel() for p in best.parameters())
    assert made["notes"] == [] or all("end tokens" in note for note in made["notes"])


def test_only_what_is_asked_for(tmp_path, llama):
    run, console = RunDir(tmp_path / "run [old]"), Console(file=io.StringIO(), width=1000)
    trained(llama, run)
    export(recipe(llama), run, console=console)
    assert f"{run.head}: " in console.file.getvalue()
    assert sorted(p.name for p in run.root.iterdir()) == ["head", "train"]
    assert sorted(p.name for p in run.head.iterdir()) == ["config.json", "model.safetensors"]


def test_nothing_trained_and_another_target(tmp_path, llama):
    run = RunDir(tmp_path / "run")
    run.finish("train", {}, {})
    with refused("train/best", "drafthead train RECIPE"):
        export(recipe(llama), run, console=Console(quiet=True))
    assert run.finished("train", {}) is None, "or that command would find nothing to do"
    trained(llama, run, vocab_size=100)
    with refused("train/best", "vocab_size"):
        export(recipe(llama), run, console=Console(quiet=True))
    assert not run.head.exists()


def test_the_recipes_chat_template_is_published_with_the_head(tmp_path, llama):
    run = RunDir(tmp_path / "run")
    trained(llama, run)
    target = {"path": str(llama), "chat_template": templates.CHATML}
    export(recipe(llama, target=target), run, console=Console(quiet=True))
    assert (run.head / "chat_template.jinja").read_text() == templates.CHATML
    assert load_head(run.head)


def test_other_engines_get_what_they_read(tmp_path, lfm2_moe):
    run, console = RunDir(tmp_path / "run"), Console(quiet=True)
    trained(lfm2_moe, run, aux_layer_ids=(1, 2, 4))
    wanted = recipe(lfm2_moe)
    export(wanted, run, console=console)
    found = export_for(wanted, run, ["vllm", "sglang", "mlx"], console=console)
    assert [found[name]["serves"] for name in found] == [True, False, True]
    assert found["vllm"]["folder"] == str(run.head)  # what SGLang does not serve, is not written
    mlx = load_head(found["mlx"]["folder"])
    assert (mlx.read.format, mlx.embedding.shape) == (
        "speculators",
        (mlx.head.config.vocab_size, 64),
    )
    with refused("SGLang", "head.kind") as error:
        export_for(wanted, run, ["sglang"], console=console)
    assert error.value.field == "for"
