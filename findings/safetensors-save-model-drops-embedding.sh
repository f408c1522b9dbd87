#!/usr/bin/env bash
# safetensors==0.8.0
#
# `save_model` saves a torch model in which two names share one tensor, as a target with a tied LM head
# has them; `save_file` refuses those.
# Expected: the embedding is kept and the LM head left out, as transformers' `save_pretrained` does.
# Seen: of the names that share a tensor the first in the alphabet is kept. So `lm_head.weight` is
#   written and `model.embed_tokens.weight` is not. The other name is only in the file's metadata,
#   which `load_file` does not show.
# Why it matters: tools that make or check draft heads read the target's embedding from the file by its
#   name and take "no lm_head.weight" for tied. Such a file has no embedding, and looks untied.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0+cpu
"$dir/venv/bin/pip" install -q safetensors==0.8.0 packaging numpy==2.3.5
cd "$dir" && venv/bin/python - <<'PY'
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_model


class Target(torch.nn.Module):
    """The names of a target with a tied LM head: model.embed_tokens, model.norm, lm_head."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(8, 4)
        self.model.norm = torch.nn.LayerNorm(4, bias=False)
        self.lm_head = torch.nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight


save_model(Target(), "model.safetensors")
names = sorted(load_file("model.safetensors"))
with safe_open("model.safetensors", "pt") as file:
    metadata = file.metadata()
print("tensors: ", names)
print("metadata:", metadata)
assert names == ["lm_head.weight", "model.norm.weight"]
assert metadata == {"model.embed_tokens.weight": "lm_head.weight"}
PY
