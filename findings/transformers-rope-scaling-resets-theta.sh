#!/usr/bin/env bash
# transformers==5.19.0
#
# Model cards tell users to switch YaRN on by adding a `rope_scaling` block to config.json.
# Expected: the block adds to the file's other RoPE settings, as it does in a file that transformers
#   4 wrote (`rope_theta` at top level).
# Seen: a config.json that transformers 5 wrote has its base in `rope_parameters.rope_theta`. With
#   `rope_scaling` beside it, all of `rope_parameters` is dropped, and the base becomes the
#   default: 1,000,000 turns into 10,000. There is no warning.
# Why it matters: the target still loads, but its hidden states and answers are wrong, so a draft head
#   captured from it (or a head whose own config was lengthened this way) is wrong too. Put the YaRN
#   keys into `rope_parameters`.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q transformers==5.19.0
"$dir/venv/bin/python" - "$dir/model" <<'PY' 2>"$dir/stderr"
import json
import pathlib
import sys

from transformers import AutoConfig, Qwen3Config

folder = pathlib.Path(sys.argv[1])
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
rope = {"rope_type": "default", "rope_theta": 1e6}
Qwen3Config(rope_parameters=rope, max_position_embeddings=131072).save_pretrained(folder)
written = json.loads((folder / "config.json").read_text())


def theta(**keys):
    """The RoPE base that is read from the same config with these keys instead."""
    others = {key: value for key, value in written.items() if key != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps({**others, **keys}))
    return AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"]


as_written = theta(rope_parameters=rope)
added_to_5 = theta(rope_parameters=rope, rope_scaling=yarn)
added_to_4 = theta(rope_theta=1e6, rope_scaling=yarn)
inside = theta(rope_parameters={**rope, **yarn})
print("written by transformers 5:                   ", as_written)
print("rope_scaling beside rope_parameters:         ", added_to_5)
print("rope_scaling beside rope_theta (4's format): ", added_to_4)
print("YaRN keys inside rope_parameters:            ", inside)
assert (as_written, added_to_5, added_to_4, inside) == (1e6, 1e4, 1e6, 1e6)
PY
if grep -i -E "theta|rope" "$dir/stderr"; then
    echo "transformers now says something about it"
    exit 1
fi
