#!/usr/bin/env bash
# transformers==5.17.0, transformers==5.19.0, gguf==0.19.0, torch==2.13.0+cpu
#
# vLLM 0.33 allows transformers 5.16 to 5.20; targets out of a GGUF file are read by transformers.
# Expected: the same tokenizer whatever the version: a token that the file marks as control or user
#   defined is one id.
# Seen: 5.17.0 makes special tokens of the file's BOS, EOS and padding only. `<|fim_prefix|>` and
#   `<tool_call>` in a text are cut into pieces there, and are one id each with 5.19.0.
# Why it matters: a folder converted by the older version asks the target other ids than the model was
#   trained on, wherever a template or a prompt has such a token, and its answers' tool calls are
#   other tokens than a server's; a head captured with one and served with the other meets other
#   texts. No message says so. Convert with 5.19 or newer, or take the model's own tokenizer.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 5.17.0 5.19.0; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -q torch==2.13.0+cpu numpy
    "$dir/$version/bin/pip" install -q "transformers==$version" gguf==0.19.0
done
cat >"$dir/write.py" <<'PY'
import sys

import gguf

letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ab", "ac"]
control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
kinds = gguf.TokenType
writer = gguf.GGUFWriter(sys.argv[1], "qwen2")
writer.add_context_length(128)
writer.add_embedding_length(8)
writer.add_block_count(1)
writer.add_feed_forward_length(8)
writer.add_head_count(1)
writer.add_head_count_kv(1)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_freq_base(1e4)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list([*letters, *control, "<tool_call>"])
writer.add_token_types(
    [kinds.NORMAL] * len(letters) + [kinds.CONTROL] * len(control) + [kinds.USER_DEFINED]
)
writer.add_token_merges(["a b", "a c"])
writer.add_bos_token_id(len(letters))
writer.add_eos_token_id(len(letters) + 2)
writer.add_pad_token_id(len(letters))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
PY
cat >"$dir/read.py" <<'PY'
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="model.gguf")
count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
print(*(f"{text} {count(text)}" for text in ("<|im_end|>", "<|fim_prefix|>", "<tool_call>")))
PY
"$dir/5.19.0/bin/python" "$dir/write.py" "$dir/model.gguf"
old=$("$dir/5.17.0/bin/python" "$dir/read.py" "$dir" 2>"$dir/stderr")
new=$("$dir/5.19.0/bin/python" "$dir/read.py" "$dir")
echo "ids with transformers 5.17.0: $old"
echo "ids with transformers 5.19.0: $new"
[ "$old" = "<|im_end|> 1 <|fim_prefix|> 14 <tool_call> 11" ]
[ "$new" = "<|im_end|> 1 <|fim_prefix|> 1 <tool_call> 1" ]
if grep -i -E "special|control|added" "$dir/stderr"; then
    echo "transformers 5.17.0 now says something about it"
    exit 1
fi
