"""NVFP4 read by its definition, worked out here in exact fractions, value by value."""

import json
import struct
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafthead.targets import nvfp4
from drafthead.targets.target import load_target
from tests.refused import refused


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> Fraction:
    """Any small IEEE-like float, from its bits."""
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = Fraction(code & (1 << mantissa_bits) - 1, 1 << mantissa_bits)
    if exponent == 0:
        return sign * mantissa * Fraction(2) ** (1 - bias)
    return sign * (1 + mantissa) * Fraction(2) ** (exponent - bias)


def to_fp32(value: Fraction) -> float:
    """Nearest fp32, ties to even: `float` rounds to fp64, so the rounding is done on integers."""
    if value == 0:
        return 0.0
    exponent = 0
    magnitude = abs(value)
    while magnitude >= 1 << 24:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1 << 23 and exponent > -149:
        magnitude, exponent = magnitude * 2, exponent - 1
    return float(round(magnitude) * Fraction(2) ** exponent) * (1 if value > 0 else -1)


def by_definition(packed, scale, scale_2) -> list[list[float]]:
    """W[n, k] = e2m1 · e4m3 · fp32, exactly, rounded to fp32 once."""
    rows, half = packed.shape
    scales = scale.view(torch.uint8)
    out = []
    for n in range(rows):
        row = []
        for k in range(half * 2):
            byte = int(packed[n, k // 2])
            code = byte >> 4 if k % 2 else byte & 15
            product = minifloat(code, 2, 1, bias=1) * minifloat(int(scales[n, k // 16]), 4, 3, 7)
            row.append(to_fp32(product * Fraction(scale_2.item())))
        out.append(row)
    return out


@pytest.mark.parametrize("scale_2", [1.0, 3.14159e-3, 1.7e-5, 2.0**-30 / 3])
def test_every_code_with_every_scale(scale_2):
    codes = torch.arange(256, dtype=torch.uint8)  # each pair of codes, in both halves
    packed = codes.view(32, 8).repeat(8, 1)  # [256, 8]: one block of 16 a row
    scales = torch.arange(256, dtype=torch.uint8)
    scales[[0x7F, 0xFF]] = 0  # NaN is no scale
    scale = scales.view(256, 1).view(torch.float8_e4m3fn)
    scale_2 = torch.tensor(scale_2)
    found = nvfp4.dequantize(packed, scale, scale_2)
    expected = torch.tensor(by_definition(packed, scale, scale_2))
    assert torch.equal(found, expected)
    assert found.unique().numel() > 400


def test_stacked_experts_have_a_scale_each():
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (3, 4, 16), generator=generator, dtype=torch.uint8)
    scale = torch.rand(3, 4, 2, generator=generator).to(torch.float8_e4m3fn)
    scale_2 = torch.tensor([0.1, 0.01, 7.0])
    found = nvfp4.dequantize(packed, scale, scale_2)
    for expert in range(3):
        assert torch.equal(
            found[expert], nvfp4.dequantize(packed[expert], scale[expert], scale_2[expert])
        )
        expected = by_definition(packed[expert], scale[expert], scale_2[expert])
        assert torch.equal(found[expert], torch.tensor(expected))


def test_packing_takes_the_nearest_value_and_saturates():
    generator = torch.Generator().manual_seed(2)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    evens = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]  # codes 0, 2, 2, 4, 4, 6, 6
    exact = torch.zeros(2, 16)
    exact[0, :7], exact[1, :7] = ties, -ties
    exact[:, 15] = 6.0  # so that the block's scale is one
    found = nvfp4.dequantize(*nvfp4.pack(exact, torch.tensor(1.0)), torch.tensor(1.0))
    assert found[0, :7].tolist() == evens
    assert found[1, :7].tolist() == [-v for v in evens]

    values = torch.randn(64, 48, generator=generator) * torch.rand(64, 1, generator=generator)
    values[3] = 0
    scale_2 = values.abs().max() / (6 * 448)
    packed, scale = nvfp4.pack(values, scale_2)
    found = nvfp4.dequantize(packed, scale, scale_2)
    steps = scale.float().repeat_interleave(16, 1) * scale_2
    representable = nvfp4.E2M1.view(1, 1, -1) * steps.unsqueeze(-1)
    nearest = (representable - values.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((found - values).abs(), nearest, rtol=0, atol=1e-6)
    assert (found[3] == 0).all()
    small = values.abs().max() / 4 / (6 * 448)  # calibrated on less than what came
    saturated = nvfp4.dequantize(*nvfp4.pack(values, small), small)
    assert saturated.abs().max() <= values.abs().max() / 4 * 1.001


def test_what_is_not_nvfp4_is_refused():
    packed, scale = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 2)
    with refused("uint8", "float8_e4m3fn"):
        nvfp4.dequantize(packed, scale, torch.tensor(1.0))
    with refused("uint8", "float8_e4m3fn"):
        nvfp4.dequantize(packed, scale[:, :1].to(torch.float8_e4m3fn), torch.tensor(1.0))


def quantization(ignore):
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignore}


def test_a_quantized_lm_head_is_read_by_the_definition(llama, tmp_path):
    generator = torch.Generator().manual_seed(1)
    weights = load_file(llama / "model.safetensors")
    name = "lm_head.weight"
    rows, columns = weights[name].shape
    packed = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 16, generator=generator).to(torch.float8_e4m3fn)
    scale_2 = torch.tensor(0.003)
    source = tmp_path / "nvfp4"
    source.mkdir()
    changed = {name: packed, f"{name}_scale": scale, f"{name}_scale_2": scale_2}
    save_file(
        weights | changed | {"lm_head.input_scale": torch.tensor(1.0)},
        source / "model.safetensors",
    )
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((llama / file).read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization(["model.*"])
    (source / "config.json").write_text(json.dumps(config))

    values = nvfp4.dequantize(packed, scale, scale_2)
    assert torch.equal(load_target(source).lm_head(), values)


def test_the_fraction_arithmetic_itself():
    """The twin above is checked against struct, which rounds to fp32 in hardware."""
    for value in (Fraction(1, 3), Fraction(2, 3) * 2**-40, Fraction(10**9 + 7, 13)):
        assert to_fp32(value) == struct.unpack("f", struct.pack("f", float(value)))[0]
