#!/usr/bin/env bash
# xllamacpp==2026.10.11549 (the source of llama.cpp b11549)
#
# A DSpark head may bring an LM head of its own. vLLM drafts with it, whatever the vocabulary.
# Expected: llama.cpp's `convert_hf_to_gguf.py` writes it, or refuses what it cannot write.
# Seen: it does with a reduced vocabulary. With the whole one it leaves `lm_head.weight` out, and the
#   target's is used.
# Why it matters: nothing is said, and few drafts are accepted. A tiny head whose LM head was trained
#   had 163 drafts accepted where vLLM's arithmetic is used, and 1 in llama.cpp. Leave one token out
#   of the draft vocabulary, and the LM head is kept.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
pip() { "$dir/venv/bin/pip" "$@" -q; }
pip install torch==2.13.0+cpu transformers==5.19.0 numpy==2.3.5 sentencepiece==0.2.3
pip download --no-deps --no-binary :all: -d "$dir" xllamacpp==2026.10.11549
tar xzf "$dir"/xllamacpp-*.tar.gz -C "$dir"
cd "$dir" && mv xllamacpp-*/thirdparty/llama.cpp llama.cpp
cat > make.py <<'PY'
"""A target's tokenizer and a DSpark head with an LM head, over `rows` tokens of 64: make.py ROWS"""
import json
import sys
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

rows = int(sys.argv[1])
H, V, R = 64, 64, 8
norm = lambda *names: {name: torch.ones(H) for name in names}
linear = lambda name, out, width=H: {name: torch.randn(out, width)}
layer = "layers.0."
tensors = {
    **norm("hidden_norm.weight", "norm.weight"),
    **norm(layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"),
    **linear("fc.weight", H, 2 * H), **linear("lm_head.weight", rows),
    **linear("markov_head.markov_w1.weight", V, R), **linear("markov_head.markov_w2.weight", rows, R),
    **{f"{layer}self_attn.{x}_norm.weight": torch.ones(32) for x in "qk"},
    **{f"{layer}self_attn.{x}_proj.weight": torch.randn(H, H) for x in "qkvo"},
    **{f"{layer}mlp.{x}_proj.weight": torch.randn(H, H) for x in ("gate", "up", "down")},
}  # fmt: skip
if rows < V:
    tensors["d2t"] = torch.zeros(rows, dtype=torch.int64)
config = dict(
    architectures=["Qwen3DSparkModel"], model_type="qwen3", hidden_size=H, intermediate_size=H,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=V,
    draft_vocab_size=rows, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4,
    hidden_act="silu", block_size=4, mask_token_id=63, markov_rank=R, target_layer_ids=[0, 1],
    dflash_config=dict(target_layer_ids=[0, 1], mask_token_id=63), sample_from_anchor=True,
    tie_word_embeddings=False)  # fmt: skip
for name in ("head", "target"):
    Path(name).mkdir(exist_ok=True)
save_file(tensors, "head/model.safetensors")
Path("head/config.json").write_text(json.dumps(config))
target = {**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
Path("target/config.json").write_text(json.dumps(target))
Path("text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="target/tokenizer", vocab_size=V, hard_vocab_limit=False,
    byte_fallback=False, character_coverage=1.0, minloglevel=2)  # fmt: skip
PY
for rows in 63 64; do
    venv/bin/python make.py $rows
    venv/bin/python llama.cpp/convert_hf_to_gguf.py head --target-model-dir target --outtype f32 \
        --outfile head.gguf 2> log || { tail -20 log; exit 1; }
    kept=$(grep -c 'hf-to-gguf:output.weight' log || true)
    echo "LM head of $rows rows of 64: written $kept times"
    [ "$kept" = $((64 - rows)) ]
done
