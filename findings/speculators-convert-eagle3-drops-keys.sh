#!/usr/bin/env bash
# speculators==0.9.0, transformers==5.19.0
#
# `speculators convert` turns an EAGLE-3 head into speculators' format. Here the head's config.json is
# as transformers 5 writes it: the RoPE base in `rope_parameters`, the dtype in `dtype`.
# Expected: the converted head is the same head, or the conversion says what it cannot read.
# Seen: it reads only transformers 4's keys `rope_theta` and `torch_dtype`, so a base of 1,000,000
#   becomes 10,000, and bfloat16 weights become float32. `norm_before_residual` and
#   `eagle_aux_hidden_state_layer_ids` are taken from the command's options only: the head's own are
#   dropped. `norm_before_fc` is kept, but the weight of that norm is not written. Only of this last
#   one is there a warning.
# Why it matters: the head loads and drafts, with the wrong positions, residual and layers. Compare the
#   two configs, and the names of the weights, after a conversion.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
pip() { "$dir/venv/bin/pip" "$@" -q; }
pip install torch==2.13.0+cpu
pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0
pip install transformers==5.19.0 datasets==5.1.0 pydantic==2.14.4 pydantic-settings loguru==0.7.3 \
    openai==3.57.0 aiohttp httpx psutil
cd "$dir" && LOGURU_LEVEL=WARNING venv/bin/python - <<'PY'
import json

import torch
from safetensors.torch import load_file, save_file
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from transformers import LlamaConfig

H = 32
rope = {"rope_type": "default", "rope_theta": 1e6}
config = LlamaConfig(vocab_size=64, hidden_size=H, intermediate_size=H, num_hidden_layers=1,
                     num_attention_heads=4, rope_parameters=rope, dtype="bfloat16")  # fmt: skip
config.save_pretrained("target")
config.update({"draft_vocab_size": 64, "norm_before_residual": True, "norm_before_fc": True})
config.update({"eagle_aux_hidden_state_layer_ids": [1, 5, 9]})
config.save_pretrained("head")
shapes = {"fc": (H, 3 * H), "norm": (H,), "input_norm": (3 * H,), "lm_head": (64, H)}
shapes |= {f"midlayer.{name}": (H,) for name in ("input_layernorm", "hidden_norm")}
shapes |= {"midlayer.post_attention_layernorm": (H,), "midlayer.self_attn.o_proj": (H, H)}
shapes |= {f"midlayer.self_attn.{name}_proj": (H, 2 * H) for name in "qkv"}
shapes |= {f"midlayer.mlp.{name}_proj": (H, H) for name in ("gate", "up", "down")}
weights = {f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
save_file(weights, "head/model.safetensors")

Eagle3Converter().convert("head", "converted", base_model="target", validate=False)
before, after = (json.load(open(f"{name}/config.json")) for name in ("head", "converted"))
after |= {"rope_parameters": after["transformer_layer_config"]["rope_parameters"]}
keys = ("norm_before_fc", "norm_before_residual", "eagle_aux_hidden_state_layer_ids", "dtype", "rope_parameters")
for key in keys:
    print(f"{key}: {before[key]} -> {after[key]}")
assert [after[key] for key in keys] == [True, False, None, "float32", {**rope, "rope_theta": 1e4}]
weights = load_file("converted/model.safetensors")
print("input_norm.weight written:", "input_norm.weight" in weights)
assert "input_norm.weight" not in weights and weights["fc.weight"].dtype == torch.float32
PY
