"""Weights that are made up so that experts route like a real model's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from benchmarks.lib import spread_weights
from benchmarks.lib.spread_weights import E2M1_RMS, check_routing, spread

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def tensor(*shape, dtype=torch.float32):
    return nn.Parameter(torch.full(shape, 0.001).to(dtype), requires_grad=False)


def layer() -> nn.ParameterDict:
    """The kinds of tensors that vLLM makes for one sparse layer."""
    return nn.ParameterDict(
        {
            "ffn_norm_weight": tensor(256),
            "e_score_correction_bias": tensor(8),
            "gate_weight": tensor(64, 256),
            "w13_weight": tensor(4, 64, 128, dtype=torch.uint8),  # two values a byte
            "w13_weight_scale": tensor(4, 64, 16, dtype=torch.float8_e4m3fn),
            "w13_weight_scale_2": tensor(4, 2),
            "w2_weight": tensor(4, 64, 128, dtype=torch.uint8),
        }
    )


def test_every_matrix_has_the_deviation_of_its_fan_in_and_a_seed_of_its_own():
    made, again = layer(), layer()
    spread(made)
    spread(again)
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert (made["ffn_norm_weight"] == 1).all()
    assert (made["e_score_correction_bias"] == 0).all()
    assert made["gate_weight"].std().item() == pytest.approx(1 / 16, rel=0.05)
    packed = made["w13_weight"]
    assert not torch.equal(packed, made["w2_weight"])
    nibbles = torch.stack((packed & 15, packed >> 4)).long()
    values = VALUES[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    assert values.std().item() == pytest.approx(E2M1_RMS, rel=0.02)
    assert (made["w13_weight_scale"].float() == 1).all()
    whole = values * made["w13_weight_scale_2"][0, 0]
    assert whole.std().item() == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize(("reached", "fit"), [({1: 4, 4: 13, 6: 18, 8: 21}, True), ({}, False)])
def test_an_engine_whose_tokens_all_take_the_same_experts_is_refused(reached, fit, monkeypatch):
    """32 experts of which 4 are taken: as independent tokens would, and as vLLM's dummies do."""
    counted = lambda model, config, tokens: [reached.get(tokens, 4)] * 22
    monkeypatch.setattr(spread_weights, "distinct_experts", counted)
    experts = SimpleNamespace(num_experts=32, num_experts_per_tok=4)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=experts))
    if fit:
        assert check_routing(None, config) == reached
    else:
        with pytest.raises(RuntimeError, match="4 tokens reach 4"):
            check_routing(None, config)
