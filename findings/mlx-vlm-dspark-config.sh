#!/usr/bin/env bash
# mlx-vlm==0.7.10 (on Linux with mlx==0.32.4's CPU build)
#
# mlx-vlm and vLLM both serve DSpark heads of the architecture `Qwen3DSparkModel`.
# Expected: one config.json serves both, or a key that is not understood is refused.
# Seen:
#   - `target_layer_ids` at top level, enough for vLLM, is refused: there must be a `dflash_config`.
#   - `is_neox_style`, vLLM's key for the kind of RoPE, is ignored; here it is `rope_is_neox_style`
#     (which vLLM ignores).
#   - `sample_from_anchor: false` does not shorten the block. A head of block 8 is then asked for 8
#     drafts from an anchor and 8 masks, one more than it was trained with. Only a second key,
#     `dspark_bonus_anchor: true`, gives 7.
# Why it matters: the last two raise no error. With the wrong RoPE, or a block one longer than in
#   training, the output stays right but fewer drafts are accepted. Write both keys of each pair.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q 'mlx[cpu]==0.32.4' numpy==2.3.5 pillow==13.0.0
"$dir/venv/bin/pip" install -q --no-deps mlx-vlm==0.7.10
"$dir/venv/bin/python" - <<'PY'
import importlib
import importlib.util
import sys
import types

# Only the config readers are wanted: empty parent packages spare the whole server's dependencies.
root = importlib.util.find_spec("mlx_vlm").submodule_search_locations[0]
for name in ("", ".models", ".speculative", ".speculative.drafters", ".speculative.drafters.dspark"):
    package = types.ModuleType("mlx_vlm" + name)
    package.__path__ = [root + name.replace(".", "/")]
    sys.modules[package.__name__] = package
reader = importlib.import_module("mlx_vlm.speculative.drafters.dspark.config").DSparkConfig

head = dict(architectures=["Qwen3DSparkModel"], model_type="qwen3", hidden_size=64, vocab_size=128,
            intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
            num_key_value_heads=2, max_position_embeddings=256, markov_rank=8, mask_token_id=127,
            block_size=8, target_layer_ids=[0, 1, 2])  # fmt: skip
try:
    reader.from_dict(head)
    sys.exit("target_layer_ids at top level are now enough")
except TypeError as error:
    print("without dflash_config:", error)
head["dflash_config"] = {"target_layer_ids": [0, 1, 2]}
for key in ("is_neox_style", "rope_is_neox_style"):
    neox = reader.from_dict({**head, key: False}).rope_is_neox_style
    print(f"{key}: false is read as {neox}")
    assert neox == (key == "is_neox_style")
for keys, drafts in (({}, 8), ({"dspark_bonus_anchor": True}, 7)):
    config = reader.from_dict({**head, "sample_from_anchor": False, **keys})
    print("sample_from_anchor: false", keys, "drafts", config.proposal_length)
    assert not config.sample_from_anchor and config.proposal_length == drafts
PY
