"""SGLang's own readers of a head's config.json, on a folder that `tests.engines.made.make` wrote.

Its wheel runs on CUDA alone. So its two files that read DSpark's configuration are run with nothing
of their imports but the standard library, torch, msgspec and each other, and of EAGLE-3 the
function that finds the layers: FOLDER WHEEL
"""

import ast
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace as Stub

import msgspec
import torch
from transformers import AutoConfig

PLAIN = {"__future__", "collections.abc", "dataclasses", "logging", "numbers", "typing"}
SPECULATIVE = "sglang/srt/speculative/"


def read(wheel, path, only=None, **names):
    """A file of the wheel as a module, or one function of it, with `names` for what it imports."""

    def wanted(node):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or node.names[0].name
            return module in PLAIN
        return only in (None, getattr(node, "name", None)) and not isinstance(node, ast.If)

    body = [node for node in ast.parse((wheel / path).read_text()).body if wanted(node)]
    module = types.ModuleType(path)
    module.__dict__.update(names)
    sys.modules[path] = module  # dataclasses look there
    exec(compile(ast.Module(body, []), path, "exec"), module.__dict__)
    return module


def dspark(wheel, config, raw):
    dflash = read(
        wheel,
        SPECULATIVE + "dflash_utils.py",
        torch=torch,
        tree_speculative_sampling_target_only=None,
        is_npu=lambda: False,
    )
    reader = read(
        wheel,
        SPECULATIVE + "dspark_components/dspark_config.py",
        msgspec=msgspec,
        parse_dflash_draft_config=dflash.parse_dflash_draft_config,
    )
    runtime = reader.resolve_runtime_config(
        draft_hf_config=config,
        speculative_num_draft_tokens=None,
        target_vocab_size=raw["vocab_size"],
    )
    taken = reader.parse_dspark_draft_config(draft_hf_config=config)
    assert runtime.gamma == raw["block_size"]
    assert runtime.mask_token_id == raw["mask_token_id"]
    assert taken.markov_rank == raw["markov_rank"]
    assert reader.get_dspark_sample_from_anchor(config) is True
    return taken.target_layer_ids


def eagle3(wheel, config, raw):
    layers = dict.fromkeys(("num_hidden_layers", "num_attention_layers"), 1)
    head = Stub(hf_config=config, num_nextn_predict_layers=None, is_hybrid_swa=False, **layers)
    paths = Stub(speculative_draft_model_path="head", speculative_draft_model_revision="")
    path = "sglang/srt/model_executor/model_runner_components/spec_aux_hidden_state.py"
    name = "_resolve_eagle_aux_hidden_state"
    reader = read(
        wheel,
        path,
        name,
        ModelConfig=Stub(from_server_args=lambda *_, **__: head),
        get_spec=lambda: paths,
    )
    kind = Stub(is_eagle=lambda: True, is_eagle3=lambda: True)
    taken = Stub(draft_kv_num_layers=None)
    getattr(reader, name)(
        config=taken, server_args=0, model_config=0, spec_algorithm=kind, is_draft_worker=False
    )
    assert taken.eagle_use_aux_hidden_state is True
    return taken.eagle_aux_hidden_state_layer_ids


def main(folder, wheel):
    raw = json.loads((folder / "head/config.json").read_text())
    kind = json.loads((folder / "expected.json").read_text())["kind"]
    config = AutoConfig.from_pretrained(folder / "head")
    outputs = {"dspark": dspark, "eagle3": eagle3}[kind](wheel, config, raw)
    # The output of a layer is the input of the next one, by which drafthead and vLLM count.
    assert [i + 1 for i in outputs] == raw["eagle_aux_hidden_state_layer_ids"]
    versions = {"transformers": version("transformers")}
    print(json.dumps({"versions": versions, "layers read as meant": len(outputs)}))


main(Path(sys.argv[1]), Path(sys.argv[2]))
