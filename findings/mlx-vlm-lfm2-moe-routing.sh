#!/usr/bin/env bash
# mlx-vlm==0.7.10, mlx-lm==0.32.2 (on Linux with mlx==0.32.4's CPU build), transformers==5.19.0
#
# LFM2-MoE (`lfm2_moe`) scores its experts by a sigmoid. A bias is added to choose the experts; what
# they are weighed with are the scores without it.
# Expected: mlx-vlm, like mlx-lm and transformers, computes that.
# Seen: mlx-vlm takes a softmax, and weighs with the bias. With the same weights its MoE block gives
#   other states; mlx-lm's gives transformers'.
# Why it matters: LFM2-8B-A1B answers otherwise in mlx-vlm, with a draft head and without. A head
#   that was trained on the model's own answers and states is accepted less, and no message says so.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
pip() { "$dir/venv/bin/pip" "$@" -q; }
pip install torch==2.13.0+cpu transformers==5.19.0 'mlx[cpu]==0.32.4' pillow==13.0.0
pip install --no-deps mlx-vlm==0.7.10 mlx-lm==0.32.2
"$dir/venv/bin/python" - <<'PY'
import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import torch
from transformers import Lfm2MoeConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeSparseMoeBlock

SIZES = dict(hidden_size=32, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2,
             norm_topk_prob=True, use_expert_bias=True, routed_scaling_factor=1.0)  # fmt: skip
torch.manual_seed(0)
block = Lfm2MoeSparseMoeBlock(Lfm2MoeConfig(**SIZES)).float()
for tensor in (*block.parameters(), block.expert_bias):
    tensor.data.normal_(std=0.3)
x = torch.randn(1, 20, 32)
with torch.no_grad():
    right = block(x).numpy()


def of(package, module):
    """The block of a package; empty parents spare all that it has besides."""
    root = importlib.util.find_spec(package).submodule_search_locations[0]
    parts = module.split(".")[:-1]
    for n in range(len(parts) + 1):
        name = ".".join([package, *parts[:n]])
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = ["/".join([root, *parts[:n]])]
    return importlib.import_module(f"{package}.{module}").Lfm2MoeSparseMoeBlock


for package, module, same in (
    ("mlx_lm", "models.lfm2_moe", True),
    ("mlx_vlm", "models.lfm2.language", False),
):
    theirs = of(package, module)(SimpleNamespace(**SIZES))
    gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    gate, up = gate_up.chunk(2, dim=1)
    to = lambda tensor: mx.array(tensor.numpy())
    theirs.gate.weight, theirs.expert_bias = to(block.gate.weight.detach()), to(block.expert_bias)
    mlp = theirs.switch_mlp
    mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight = to(gate), to(up), to(down)
    off = np.abs(np.array(theirs(to(x))) - right).max() / np.abs(right).max()
    print(f"{package}: at most {off:.6f} off, of the largest value")
    assert (off < 1e-4) == same
PY
