#!/usr/bin/env bash
# datasets==5.2.0, pyarrow==26.0.1
#
# One chat has `content` as a string, another as a list of parts. Both are valid chat messages.
# Expected: after `to_parquet`, any Parquet reader gives the string "Q" back as it was.
# Seen: datasets stores the mixed field as its JSON type. datasets itself reads it back as it was,
#   but pyarrow (and what builds on it) gives JSON text: '"Q"' with the quotes, and the list of
#   parts as one string. If tool calls have different arguments, whole messages come back as text,
#   also in chats that call no tool.
# Why it matters: chats for a draft head's training often go through Parquet. A reader that does not
#   use datasets renders quotes into the prompts, so the head learns from text that is never served.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cd "$dir"
HF_HOME="$dir/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PY'
import json

import datasets
import pyarrow.parquet


def through_parquet(name, rows):
    """The rows' messages as datasets and as pyarrow read them from the same Parquet file."""
    with open(f"{name}.jsonl", "w") as lines:
        lines.writelines(json.dumps({"messages": messages}) + "\n" for messages in rows)
    chats = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")
    chats.to_parquet(f"{name}.parquet")
    table = pyarrow.parquet.read_table(f"{name}.parquet")
    again = datasets.load_dataset("parquet", data_files=f"{name}.parquet", split="train")
    return again["messages"][:], table["messages"].to_pylist()


parts = [{"type": "text", "text": "Q"}]
by_datasets, by_pyarrow = through_parquet(
    "content", [[{"role": "user", "content": "Q"}], [{"role": "user", "content": parts}]]
)
print("datasets:", by_datasets[0][0]["content"], by_datasets[1][0]["content"])
print("pyarrow: ", by_pyarrow[0][0]["content"], by_pyarrow[1][0]["content"])
assert by_datasets[0][0]["content"] == "Q" and by_datasets[1][0]["content"] == parts
assert by_pyarrow[0][0]["content"] == '"Q"'
assert json.loads(by_pyarrow[1][0]["content"]) == parts

call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
other = {"type": "function", "function": {"name": "g", "arguments": {"y": "s"}}}
_, messages = through_parquet(
    "calls",
    [
        [{"role": "user", "content": "Q"}],
        [{"role": "assistant", "content": "A", "tool_calls": [call]}],
        [{"role": "assistant", "content": "A", "tool_calls": [other]}],
    ],
)
print("pyarrow, with tool_calls:", repr(messages[0][0]))
assert messages[0][0] == '{"role":"user","content":"Q"}'
PY
