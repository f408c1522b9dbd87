"""NVFP4: the format itself, and checkpoints of it as NVIDIA ModelOpt writes them.

The format, of a linear layer's weight W [N, K]:

- `weight` uint8 [N, K/2]: two E2M1 codes a byte, the even column in the low four bits. A code is
  sign, two exponent bits, one mantissa bit: ±{0, 0.5, 1, 1.5, 2, 3, 4, 6} (OCP Microscaling
  Formats 1.0, table 5).
- `weight_scale` float8_e4m3fn [N, K/16]: one scale for 16 neighbours in a row.
- `weight_scale_2` float32 scalar: one scale for the tensor.
- `input_scale` float32 scalar: calibrated amax / (6 · 448) of the input, for kernels that quantize
  activations too; the weight's values do not depend on it.

W[n, k] = e2m1[n, k] · weight_scale[n, k // 16] · weight_scale_2.

Which modules are quantized stands in `hf_quant_config.json` (`exclude_modules`) and, with the
same content, in `config.json`'s `quantization_config` (`ignore`); a quantized weight is the one
that has a `weight_scale`.
"""

import itertools
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir, read_json, write_json
from drafthead.targets.safetensors_folder import SafetensorsFolder

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_E2M1, *(-v for v in _E2M1)])
"""Value of each four-bit code [16], fp32."""
_BETWEEN = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(_E2M1)])


def dequantize(packed: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """The values of an NVFP4 tensor, fp32, each the exact product rounded once.

    Args:
        packed: uint8 [..., N, K/2], the even column in the low four bits.
        scale: float8_e4m3fn [..., N, K/16].
        scale_2: fp32 scalar, or [...] with one value a matrix (stacked experts).

    Returns:
        fp32 [..., N, K].

    Raises:
        DraftheadError: types or shapes that are not NVFP4's.
    """
    blocks = packed.shape[-1] * 2 // BLOCK
    if (
        packed.dtype != torch.uint8
        or scale.dtype != torch.float8_e4m3fn
        or packed.shape[-1] * 2 % BLOCK
        or scale.shape != (*packed.shape[:-1], blocks)
    ):
        raise DraftheadError(
            f"not NVFP4: weight {packed.dtype} {tuple(packed.shape)} with scale {scale.dtype} "
            f"{tuple(scale.shape)}; expected uint8 [.., N, K/2] and float8_e4m3fn [.., N, K/16]"
        )
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()
    values = E2M1.to(packed.device)[codes].unflatten(-1, (blocks, BLOCK))
    # E2M1 has two significant bits and E4M3 four, so this first product is exact in fp32
    values = (values * scale.float().unsqueeze(-1)).flatten(-2)
    scale_2 = scale_2.float()
    return values * (scale_2 if scale_2.ndim == 0 else scale_2.reshape(*scale_2.shape, 1, 1))


def pack(values: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to NVFP4: each block's largest value goes to ±6, ties to the even code.

    Args:
        values: [..., N, K], K a multiple of 16.
        scale_2: fp32 scalar, amax / (6 · 448) for ordinary weights. Values beyond that amax
            saturate.

    Returns:
        Packed uint8 [..., N, K/2] and float8_e4m3fn scales [..., N, K/16], for `dequantize`.
    """
    blocks = values.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1) / (E2M1_MAX * scale_2)
    scale = torch.where(scale == 0, 1.0, scale)  # a block of zeros, whatever its scale
    scale = scale.clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)
    scaled = (blocks / (scale.float() * scale_2).unsqueeze(-1)).flatten(-2)
    size = scaled.abs()
    bounds = _BETWEEN.to(size.device)
    code = torch.bucketize(size, bounds)  # on a bound: the lower code
    code += (size.unsqueeze(-1) == bounds[1::2]).any(-1)  # … unless that one is odd
    code = (code | (scaled < 0).int() << 3).to(torch.uint8)
    return code[..., ::2] | code[..., 1::2] << 4, scale


def quantization_of(folder: Path) -> dict | None:
    """ModelOpt's description of the checkpoint, or None for a dense one.

    Returns:
        `{"quant_algo": .., "group_size": .., "exclude_modules": [..]}` as the checkpoint says,
        wherever it says so.

    Raises:
        DraftheadError: the two places that may say it disagree.
    """
    stated = []
    if (folder / "hf_quant_config.json").is_file():
        inner = read_json(folder / "hf_quant_config.json", "ModelOpt's quantization").get(
            "quantization", {}
        )
        stated.append((inner, inner.get("exclude_modules") or []))
    config = read_json(folder / "config.json", "a target's configuration")
    inline = config.get("quantization_config")
    if inline and str(inline.get("quant_method", "modelopt")).startswith("modelopt"):
        inner = inline.get("quantization", inline)
        stated.append((inner, inner.get("ignore") or inner.get("exclude_modules") or []))
    if not stated:
        return None
    found = [
        {
            "quant_algo": str(inner.get("quant_algo", "")).upper(),
            "group_size": inner.get("group_size"),
            "exclude_modules": sorted(exclude),
        }
        for inner, exclude in stated
    ]
    algos = {f["quant_algo"] for f in found}
    excluded = {tuple(f["exclude_modules"]) for f in found}
    if len(algos) > 1 or len(excluded) > 1:
        raise DraftheadError(
            f"{folder}: hf_quant_config.json and config.json's quantization_config disagree about "
            "what is quantized; keep the one that the checkpoint was made with"
        )
    return found[0]


def expand(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a dense checkpoint with the values of an NVFP4 one, for what cannot read NVFP4.

    Quantized weights are dequantized to `dtype`; everything else is copied as it is stored, the
    tokenizer included; scales and `quantization_config` are left out.

    Raises:
        DraftheadError: `folder` is not a whole NVFP4 checkpoint.
    """
    stated = quantization_of(folder)
    if stated is None or "NVFP4" not in stated["quant_algo"]:
        raise DraftheadError(
            f"{folder}: quantized as {stated['quant_algo'] if stated else 'nothing'}, not NVFP4"
        )
    source = SafetensorsFolder(folder)
    scales = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
    with atomic_dir(out) as fresh:
        weights = {}
        for name in source.where:
            if name.rsplit(".", 1)[-1] in scales:
                continue
            tensor = source.tensor(name)
            if f"{name}_scale" in source:
                scale, scale_2 = (source.tensor(f"{name}_{s}") for s in ("scale", "scale_2"))
                tensor = dequantize(tensor, scale, scale_2).to(dtype)
            weights[name] = tensor
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        for file in folder.iterdir():
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copy(file, fresh / file.name)
        (fresh / "hf_quant_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        write_json(fresh / "config.json", config)
    return out
