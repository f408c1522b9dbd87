"""NVFP4 checkpoints by ModelOpt: what they hold, bit for bit, and what is refused."""

import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from drafthead.data.chats import Chat
from drafthead.quantize import RECORD, _beside_weights, chats_of, quantize
from drafthead.targets import load_target, nvfp4
from tests.nvfp4 import dense_folder
from tests.refused import refused

CHATS = [Chat(None, ((f"What is {a} times {b}?",),), "test") for a in range(4) for b in range(3)]


def made(target, folder):
    record = quantize(target, folder, CHATS[:8], CHATS[8:], max_new_tokens=24)
    return folder, record, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def moe(lfm2_moe, tmp_path_factory):
    return made(lfm2_moe, tmp_path_factory.mktemp("quantized") / "lfm2_moe")


@pytest.fixture(scope="module")
def dense(llama, tmp_path_factory):
    return made(llama, tmp_path_factory.mktemp("quantized") / "llama")


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_weights_are_the_targets_packed(kind, request, lfm2_moe, llama):
    folder, _, packed = request.getfixturevalue(kind)
    source = load_file((lfm2_moe if kind == "moe" else llama) / "model.safetensors")
    quantized = {name for name in source if f"{name}_scale" in packed}
    plain = ("embed_tokens", "lm_head", "norm", ".conv.", "feed_forward.gate.", "expert_bias")
    assert quantized == {name for name in source if not any(part in name for part in plain)}
    for name, weight in source.items():
        if name not in quantized:
            assert torch.equal(packed[name], weight), name
            continue
        scale_2 = packed[f"{name}_scale_2"]
        codes, scale = nvfp4.pack(weight, scale_2)
        assert torch.equal(packed[name], codes), name
        assert torch.equal(packed[f"{name}_scale"].view(torch.uint8), scale.view(torch.uint8))
        assert packed[f"{name.removesuffix('.weight')}.input_scale"] > 0
    # what vLLM fuses shares one scale, or its GPU kernels would change the values
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), (".w1.", ".w3."))
    for group in groups:
        for name in quantized:
            if group[0] in name:
                for other in group[1:]:
                    for end in ("_scale_2",):
                        pair = packed[name + end], packed[name.replace(group[0], other) + end]
                        assert torch.equal(*pair), name
    stated = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert stated["quant_algo"] == "NVFP4"
    assert "lm_head" in stated["exclude_modules"]
    assert (kind == "moe") == any("conv" in name for name in stated["exclude_modules"])
    assert load_target(folder).tokenizer().chat_template


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_perplexity_is_that_of_the_checkpoint(kind, request, tmp_path, lfm2_moe, llama):
    """The simulated figures, against the written checkpoint run by plain transformers."""
    from transformers import AutoModelForCausalLM

    from drafthead import quantize as module
    from drafthead.data.template import Template

    folder, record, _ = request.getfixturevalue(kind)
    target = load_target(lfm2_moe if kind == "moe" else llama)
    model = AutoModelForCausalLM.from_pretrained(target.path, dtype="auto").eval()
    template = Template(target.tokenizer(), target.eos_token_ids, "test")
    torch.manual_seed(0)
    module._answered(model, template, CHATS[:8], 24)  # draws as many random numbers as it did
    held = module._answered(model, template, CHATS[8:], 24)
    assert module._perplexity(model, held)[0] == pytest.approx(record["perplexity"], rel=1e-5)
    dense_folder(folder, tmp_path / "expanded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded", dtype="auto").eval()
    found = module._perplexity(model, held)[0]
    assert found == pytest.approx(record["perplexity_w4a16"], rel=1e-4)
    assert not math.isclose(found, record["perplexity"], rel_tol=1e-3)
    assert not math.isclose(found, record["perplexity_w4a4"], rel_tol=1e-3)
    assert record["bytes"] < 0.6 * record["bytes_before"]


@pytest.mark.parametrize("kind", ["lfm2_moe", "llama"])
def test_answers_do_not_depend_on_their_batch(kind, request, monkeypatch):
    """Prompts of other lengths beside them mean padding on the left, convolutions included."""
    from transformers import AutoModelForCausalLM

    from drafthead import quantize as module
    from drafthead.data.template import Template

    target = load_target(request.getfixturevalue(kind))
    model = AutoModelForCausalLM.from_pretrained(target.path, dtype="auto").eval()
    template = Template(target.tokenizer(), target.eos_token_ids, "test")
    monkeypatch.setattr(module, "TEMPERATURE", 1e-3)  # as good as greedy
    chats = [Chat(None, (("word " * n,),), "test") for n in (1, 9, 4, 30)]
    together = module._answered(model, template, chats, 12)
    for chat, (ids, start) in zip(chats, together):
        (alone, _), *_ = module._answered(model, template, [chat], 12)
        assert torch.equal(ids, alone)
        assert len(ids) > start


def test_no_second_copy_of_the_weights_comes_along(tmp_path):
    others = {"config.json", "tokenizer.model", "merges.txt", "LICENSE", "modeling_bin.py"}
    weights = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.gguf"}
    weights |= {"pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"}
    for name in others | weights:
        (tmp_path / name).touch()
    assert {file.name for file in _beside_weights(tmp_path)} == others


def test_a_finished_checkpoint_is_left_alone(moe, lfm2_moe):
    folder, record, _ = moe
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert quantize(lfm2_moe, folder, CHATS[:8], CHATS[8:], max_new_tokens=24) == record
    assert json.loads((folder / RECORD).read_text()) == record
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with refused(folder):
        quantize(lfm2_moe, folder, CHATS[:7], CHATS[8:], max_new_tokens=24)


def test_prompts_of_every_source_are_taken(llama, tmp_path):
    """The first ones of the first file had been all that a target was calibrated on."""
    for name in ("chat", "code"):
        lines = (json.dumps({"prompt": f"{name} {i}"}) + "\n" for i in range(40))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("chat", "code")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "name": "x",
                "target": {"path": str(llama)},
                "prompts": {"sources": sources, "heldout": 30},
            }
        )
    )
    for side in chats_of(llama, recipe, 12, 12):
        assert {chat.source for chat in side} == {"chat", "code"}
        assert len(side) == 12


def test_the_command_and_its_prompts(llama, tmp_path):
    from typer.testing import CliRunner

    from drafthead.cli import app

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {i}."}) + "\n" for i in range(9)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\ntarget:\n  path: {llama}\n"
        f"prompts:\n  heldout: 4\n  sources:\n    - path: {prompts}\n"
    )
    calibration, held = chats_of(llama, recipe, 3, 16)
    assert (len(calibration), len(held)) == (3, 4)
    assert not {c.id for c in calibration} & {c.id for c in held}
    arguments = ["quantize", str(llama), str(tmp_path / "out"), "--prompts", str(prompts), "--json"]
    arguments += ["--samples", "3", "--heldout", "2", "--exclude", "q_proj", "--exclude", "lm_head"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["perplexity_w4a4"] > 1
    packed = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight_scale" not in packed
    assert "model.layers.0.self_attn.k_proj.weight_scale" in packed


def test_what_cannot_be_quantized_is_refused(moe, llama, tmp_path, monkeypatch):
    with refused(field="quantization_config"):
        quantize(moe[0], tmp_path / "out", CHATS[:8], CHATS[8:])
    with refused(field="prompts"):
        quantize(llama, tmp_path / "out", [], CHATS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("nvidia-modelopt", "[quantize]"):
        quantize(llama, tmp_path / "out", CHATS, CHATS)
    assert not (tmp_path / "out").exists()
