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

import torch

from drafthead.errors import DraftheadError

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
