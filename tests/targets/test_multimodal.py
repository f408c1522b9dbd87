"""A text model that is a part of a multimodal checkpoint: its own tensors are read, no tower's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from drafthead.capture import engine
from drafthead.data.chats import Chat
from drafthead.head.init import LLAMA_LAYER, target_layer
from drafthead.ops.losses import Teacher
from drafthead.quantize import quantize
from drafthead.recipe import parse_recipe
from drafthead.states import StoreMeta
from drafthead.targets import load_target
from tests import wrappers
from tests.refused import refused


def change(folder, change):
    """Have ``change`` at the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", list(wrappers.SETTINGS))
def test_teacher_is_transformers_logits(kind, tied, tmp_path):
    folder = wrappers.write(kind, tmp_path / "target", tied=tied)
    target, model = load_target(folder), AutoModelForMultimodalLM.from_pretrained(folder).eval()
    last = {}
    decoder = model.get_decoder()
    norm = getattr(decoder, "model", decoder).norm  # Llama 4's still has its LM head around it
    norm.register_forward_hook(lambda _m, args, _out: last.update(x=args[0][0]))
    with torch.no_grad():
        logits = model(torch.arange(5, 25)[None] + 5).logits[0]
    assert target.multimodal
    assert target.num_layers == 4
    assert target.tied_embeddings == tied
    assert torch.equal(target.embedding(), model.get_input_embeddings().weight)
    teacher = Teacher(*target.final_norm(), target.lm_head(), target.logits)
    torch.testing.assert_close(teacher.logits(last["x"]), logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def mistral(tmp_path):
    return wrappers.write("mistral3", tmp_path / "target", tied=False)


def test_the_tokenizer_is_the_one_with_the_chat_template(mistral):
    """Mistral's repositories hold it twice; transformers prefers the copy without a template."""
    (mistral / "tekken.json").write_text("{}")
    assert load_target(mistral).tokenizer().chat_template


def test_the_processors_template_is_the_servers(mistral):
    """Of old checkpoints it lies in a file that the tokenizer does not read."""
    own = load_target(mistral).chat_template
    assert own == load_target(mistral).tokenizer().chat_template
    legacy = mistral / "chat_template.json"
    legacy.write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert load_target(mistral).chat_template == "{{ messages[0].content }}"
    for unread in ("{}", "{"):
        legacy.write_text(unread)
        assert load_target(mistral).chat_template == own


def test_a_towers_tensors_of_the_same_names_are_not_taken(mistral):
    def add(tensors):
        for name in ("embed_tokens", "norm"):
            tensors[f"audio_tower.model.{name}.weight"] = torch.zeros(7)
        tensors["audio_tower.lm_head.weight"] = torch.zeros(7)

    change(mistral, add)
    target = load_target(mistral)
    assert target.decoder == "language_model.model."
    assert target.lm_head().shape == target.embedding().shape == (512, 64)
    assert target.final_norm()[0].shape == (64,)
    change(mistral, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    config = json.loads((mistral / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (mistral / "config.json").write_text(json.dumps(config))
    assert load_target(mistral).tied_embeddings


def test_a_layer_to_start_from_is_the_text_models(mistral):
    change(mistral, lambda t: t.update({"vision_tower.layers.3.mlp.up_proj.weight": torch.ones(2)}))
    layer = target_layer(load_target(mistral))
    assert layer.keys() == LLAMA_LAYER
    assert layer["self_attn.q_proj.weight"].shape == (64, 64)


def test_two_text_models_are_refused(mistral):
    def two(tensors):
        for name in [name for name in tensors if name.startswith("language_model.model.")]:
            tensors[name.replace("language_model", "talker")] = tensors[name].clone()
            tensors[name.replace("language_model", "thinker")] = tensors.pop(name)

    change(mistral, two)
    with refused("talker.model.", "thinker.model."):
        load_target(mistral).embedding()


def test_a_text_model_that_cannot_be_told_is_refused(mistral):
    config = json.loads((mistral / "config.json").read_text())
    config["text_config"] = 7
    (mistral / "config.json").write_text(json.dumps(config))
    with refused("config.json"):
        load_target(mistral)


@pytest.mark.parametrize("asked", [None, False])
def test_capture_runs_text_alone_unless_told(asked, mistral, monkeypatch):
    def start(**args):
        raise RuntimeError(args["language_model_only"])

    monkeypatch.setattr(engine, "llm_class", lambda: start)
    target = load_target(mistral)
    data = {
        "name": "t",
        "target": {"path": str(mistral)},
        "prompts": {"sources": [{"path": "unused.jsonl"}]},
        "engine": {"extra": {} if asked is None else {"language_model_only": asked}},
    }
    meta = StoreMeta((1, 3), target.num_layers, target.hidden_size, "fp32", 1, {})
    with refused(asked is None):
        engine.CaptureEngine(parse_recipe(data, "test"), target, meta, None)


def test_quantize_refuses_it(mistral, tmp_path):
    chats = [Chat(None, (("Hello",),), "test")]
    with refused(field="text_config"):
        quantize(mistral, tmp_path / "out", chats, chats)
