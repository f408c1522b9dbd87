"""Heads on disk: two formats, others' dialects, and everything that can be wrong with them."""

import io
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from drafthead.drafters.inspect import check_fit, describe, inspect_head
from drafthead.errors import UnsupportedHead
from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.config import estimate_cost
from drafthead.head.formats import LLAMA, Provenance
from drafthead.targets import load_target
from tests.heads import small_head
from tests.refused import refused

MADE = Provenance(target="some/target", target_fingerprint="f" * 16, target_architectures=("X",))
FLAGS = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}


def saved(folder: Path, head=None, **options) -> Path:
    save_head(head or small_head(), folder, MADE, **options)
    return folder


def edit(folder: Path, **changes) -> None:
    """Change `config.json`; None takes a key away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: Path, change) -> None:
    """`change` maps the dict of tensors to another."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("format", ["vllm", "speculators"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        FLAGS,
        {"fc_norm": True, "attention_bias": True, "num_hidden_layers": 2, "aux_layer_ids": (0, 3)},
        {"rope_theta": 5e6, "draft_vocab_size": 61},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["plain", "flags", "two_layers", "whole_vocabulary", "llama3_rope"],
)
def test_what_is_saved_comes_back(tmp_path, format, changes):
    head = small_head(**changes)
    saved(tmp_path / "head", head, format=format)
    loaded = load_head(tmp_path / "head")
    assert loaded.head.config == head.config
    assert loaded.read.format == format
    assert loaded.read.provenance["target_fingerprint"] == "f" * 16
    assert loaded.embedding is None
    back = dict(loaded.head.named_parameters())
    for name, parameter in head.named_parameters():
        assert back[name].dtype == torch.bfloat16
        assert torch.equal(back[name], parameter.bfloat16())
    for name in ("d2t", "t2d", "inv_freq_bits"):
        assert torch.equal(getattr(loaded.head, name), getattr(head, name))
    assert inspect_head(tmp_path / "head")["problems"] == []


def test_the_config_says_what_vllm_reads(tmp_path):
    config = json.loads((saved(tmp_path / "h") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4]
    assert config["num_aux_hidden_states"] == 3
    inputs = config["eagle_aux_hidden_state_layer_ids"]
    outputs = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert inputs == [i + 1 for i in outputs] == [1, 2, 4]
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == "bfloat16"


def test_an_embedding_of_its_own_comes_back(tmp_path):
    head = small_head(hidden_size=16)
    own = torch.randn(61, 16)
    saved(tmp_path / "h", head, embedding=own)
    assert torch.equal(load_head(tmp_path / "h").embedding, own.bfloat16())
    saved(tmp_path / "without", head)
    with refused("embed_tokens.weight"):
        load_head(tmp_path / "without")


def test_other_spellings_of_names(tmp_path):
    saved(tmp_path / "h")

    def rename(tensors):
        names = {n: "model." + n.replace("layers.0.", "midlayer.") for n in tensors}
        kept = {n: n for n in ("d2t", "t2d", "lm_head.weight")}
        return {{**names, **kept}[n]: t for n, t in tensors.items()}

    before = load_head(tmp_path / "h").head.state_dict()
    edit_tensors(tmp_path / "h", rename)
    edit(tmp_path / "h", architectures=["LlamaForCausalLMEagle3"])
    after = load_head(tmp_path / "h").head.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_missing_norm_before_residual_means_true_in_speculators(tmp_path):
    saved(tmp_path / "h", format="speculators")
    edit(tmp_path / "h", norm_before_residual=None)
    loaded = load_head(tmp_path / "h")
    assert loaded.head.config.norm_before_residual is True
    assert "norm_before_residual" in loaded.read.notes[0]


def test_layer_ids_inside_eagle_config(tmp_path, llama):
    """vLLM's older runner takes them for inputs, SGLang, SpecForge and ModelOpt for outputs."""
    target = load_target(llama)
    folder = saved(tmp_path / "h", small_head(aux_layer_ids=(2, 9, 15)))
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 8, 14], "use_aux_hidden_state": True}
    edit(folder, eagle_aux_hidden_state_layer_ids=None, eagle_config=nested)
    with refused([1, 8, 14], [2, 9, 15]) as error:
        load_head(folder, target)
    assert error.value.field == "eagle_aux_hidden_state_layer_ids"
    edit(folder, eagle_config=nested | {"use_last_layernorm": True})  # as ModelOpt alone writes
    loaded = load_head(folder)
    assert loaded.head.config.aux_layer_ids == (2, 9, 15)
    assert "layer outputs" in loaded.read.notes[0]
    for top in ([1, 8, 14], [2, 9, 15]):  # the same ids twice, or each in its own way of counting
        edit(folder, eagle_config=nested, eagle_aux_hidden_state_layer_ids=top)
        assert load_head(folder).head.config.aux_layer_ids == tuple(top)
    edit(folder, eagle_aux_hidden_state_layer_ids=[3, 9, 15])
    with refused([3, 9, 15], [2, 9, 15]):
        load_head(folder)


def test_missing_layer_ids_need_the_target(tmp_path, llama):
    target = load_target(llama)
    default = target.default_aux_layers()
    saved(tmp_path / "h", small_head(aux_layer_ids=default))
    edit(tmp_path / "h", eagle_aux_hidden_state_layer_ids=None, eagle_config=None)
    with refused("eagle_aux_hidden_state_layer_ids"):
        load_head(tmp_path / "h")
    assert load_head(tmp_path / "h", target).head.config.aux_layer_ids == default


def test_logit_scale_is_folded_into_the_lm_head(tmp_path):
    head = small_head()
    saved(tmp_path / "h", head)
    edit(tmp_path / "h", logit_scale=0.5)
    loaded = load_head(tmp_path / "h").head
    assert torch.equal(loaded.lm_head.weight, head.lm_head.weight.bfloat16() * 0.5)


def drop(*names):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def replace(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


BROKEN = {
    "d2t missing": (drop("d2t"), "d2t"),
    "d2t holds ids": (replace("d2t", torch.arange(38, 61)), "d2t"),
    "d2t descends": (replace("d2t", torch.arange(23).flip(0)), "d2t"),
    "d2t repeats": (replace("d2t", -torch.arange(23)), "d2t"),
    "d2t negative": (replace("d2t", torch.full((23,), -1)), "d2t"),
    "d2t too short": (replace("d2t", torch.zeros(22, dtype=torch.int64)), "d2t"),
    "d2t of fractions": (replace("d2t", torch.full((23,), 0.5)), "d2t"),
    "d2t not a number": (replace("d2t", torch.full((23,), float("nan"))), "d2t"),
    "lm_head rows": (replace("lm_head.weight", torch.ones(24, 32)), "lm_head.weight"),
    "lm_head missing": (drop("lm_head.weight"), "lm_head.weight"),
    "fc width": (replace("fc.weight", torch.ones(32, 64)), "fc.weight"),
    "tensor missing": (drop("layers.0.mlp.up_proj.weight"), "up_proj.weight"),
    "tensor too many": (replace("layers.0.self_attn.q_norm.weight", torch.ones(8)), "q_norm"),
    "quantized": (replace("fc.weight", torch.ones(32, 96, dtype=torch.int8)), "fc.weight"),
    "t2d of another": (replace("t2d", torch.ones(60, dtype=torch.bool)), "t2d"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_named(tmp_path, case):
    change, name = BROKEN[case]
    saved(tmp_path / "h")
    edit_tensors(tmp_path / "h", change)
    with refused(name):
        load_head(tmp_path / "h")
    about = inspect_head(tmp_path / "h")
    assert any(name in problem for problem in about["problems"])
    assert not about["unsupported"]


BROKEN_CONFIG = {
    "no eagle": ({"architectures": ["LlamaModel"]}, "architectures"),
    "eagle 1": ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "unsorted": (
        {"eagle_aux_hidden_state_layer_ids": [4, 2, 1], "eagle_config": {}},
        "[4, 2, 1]",
    ),
    "negative layer": (
        {"eagle_aux_hidden_state_layer_ids": [-1, 2, 4], "eagle_config": {}},
        "aux_layer_ids",
    ),
    "draft larger": ({"draft_vocab_size": 62}, "draft_vocab_size"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "heads of a width": ({"num_attention_heads": 6, "num_key_value_heads": 6}, "hidden_size"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act"),
    "huge": ({"vocab_size": 10**15}, "vocab_size"),
    "text": ({"hidden_size": "wide"}, "hidden_size"),
    "true": ({"num_attention_heads": True}, "num_attention_heads"),
    "odd width": ({"head_dim": 7}, "head_dim"),
    "epsilon": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "half a layer": ({"num_hidden_layers": 1.0}, "num_hidden_layers"),
    "rope": ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_scaling"),
    "no factor": ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_scaling"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
    "rope of text": ({"rope_parameters": "none"}, "rope"),
    "no window": ({"layer_types": ["sliding_attention"]}, "sliding_window"),
    "layers without a kind": ({"layer_types": [], "num_hidden_layers": 2}, "num_hidden_layers"),
    "too many kinds": ({"layer_types": ["full_attention"] * 2}, "layer_types"),
    "flag": ({"fc_norm": "yes"}, "fc_norm"),
    "scale": ({"logit_scale": "1"}, "logit_scale"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIG)
def test_broken_configs_are_named(tmp_path, case):
    changes, name = BROKEN_CONFIG[case]
    saved(tmp_path / "h")
    edit(tmp_path / "h", **changes)
    with refused(name) as error:
        load_head(tmp_path / "h")
    assert error.value.exit_code == 2
    about = inspect_head(tmp_path / "h")
    assert any(name in problem for problem in about["problems"])
    assert not about["unsupported"]


UNSUPPORTED = {
    "qwen": ({"model_type": "qwen3"}, "model_type"),
    "another class of vLLM's": ({"architectures": ["Eagle3Qwen3ForCausalLM"]}, "architectures"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
    "older yarn": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type"),
    "a part of a head turned": ({"partial_rotary_factor": 0.5}, "RoPE"),
    "biases": ({"mlp_bias": True}, "mlp_bias"),
    "bias": ({"bias": True}, "bias"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "both ways": ({"is_causal": False}, "is_causal"),
    "narrow": ({"layer_types": ["sliding_attention"], "sliding_window": 8}, "sliding_window"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_only_vllm_computes_is_not_called_broken(tmp_path, case):
    changes, name = UNSUPPORTED[case]
    saved(tmp_path / "h")
    edit(tmp_path / "h", **changes)
    with refused(name, error=UnsupportedHead) as error:
        load_head(tmp_path / "h")
    assert error.value.exit_code == 3
    about = inspect_head(tmp_path / "h")
    assert not about["ok"]
    assert not about["problems"]
    assert name in about["unsupported"][0]


def test_values_that_no_training_leaves(tmp_path):
    saved(tmp_path / "h")
    edit_tensors(tmp_path / "h", replace("norm.weight", torch.full((32,), float("nan"))))
    assert "norm.weight" in inspect_head(tmp_path / "h")["problems"][0]
    edit_tensors(tmp_path / "h", replace("norm.weight", torch.zeros(32)))
    assert "norm.weight" in inspect_head(tmp_path / "h")["problems"][0]


def test_d2t_of_a_whole_vocabulary_is_refused_by_vllm(tmp_path):
    saved(tmp_path / "h", small_head(draft_vocab_size=61))
    edit_tensors(tmp_path / "h", replace("d2t", torch.zeros(61, dtype=torch.int64)))
    load_head(tmp_path / "h")
    assert "d2t" in inspect_head(tmp_path / "h")["problems"][0]


def test_a_pickle_is_not_opened(tmp_path):
    saved(tmp_path / "h")
    (tmp_path / "h" / "model.safetensors").rename(tmp_path / "h" / "pytorch_model.bin")
    with refused("pytorch_model.bin"):
        load_head(tmp_path / "h")


def test_a_target_is_no_head(llama):
    problems = inspect_head(llama)["problems"]
    assert any("no EAGLE-3 head" in problem for problem in problems)


def test_what_people_read(tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(describe(inspect_head(saved(tmp_path / "h"))))
    console.print(describe(inspect_head(tmp_path / "nowhere")))
    text = console.export_text()
    assert "layers 1, 2, 4 of a target of width 32" in text
    assert "23 of 61 tokens" in text
    assert "nothing wrong found" in text
    assert "broken:" in text


def test_not_there(tmp_path):
    with refused("nowhere", "config.json"):
        load_head(tmp_path / "nowhere")
    assert not inspect_head(tmp_path / "nowhere")["ok"]


def fitting(target, **changes):
    """A small head with the widths, vocabulary and default layers of a target."""
    return small_head(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        **{
            "aux_layer_ids": target.default_aux_layers(),
            "max_position_embeddings": target.max_position_embeddings,
            **changes,
        },
    )


def test_a_head_is_compared_with_its_target(tmp_path, llama):
    target = load_target(llama)
    made = Provenance(target=str(llama), target_fingerprint=target.fingerprint)
    head = fitting(target)
    head.set_vocab(torch.zeros(23, dtype=torch.int64))
    save_head(head, tmp_path / "h", made)
    assert inspect_head(tmp_path / "h", target)["notes"] == []
    saved(tmp_path / "other")
    problems = " ".join(inspect_head(tmp_path / "other", target)["problems"])
    assert "target_hidden_size is 32" in problems
    assert "vocab_size is 61" in problems
    saved(tmp_path / "deep", fitting(target, aux_layer_ids=(1, 2, 7)))
    assert "has 6 layers" in inspect_head(tmp_path / "deep", target)["problems"][0]
    lower = tuple(i - 1 for i in target.default_aux_layers())
    saved(tmp_path / "lower", fitting(target, aux_layer_ids=lower))
    notes = " ".join(inspect_head(tmp_path / "lower", target)["notes"])
    assert "moved by one" in notes
    assert "other files" in notes


def test_cost_counts_the_parameters():
    for changes in ({}, FLAGS, {"fc_norm": True, "attention_bias": True, "num_hidden_layers": 2}):
        head = small_head(**changes)
        cost = estimate_cost(head.config)
        assert cost.parameters == sum(p.numel() for p in head.parameters())
        fc = head.fc.weight.numel()
        norms_of_fc = cost.bytes_first_step - cost.bytes_per_draft_step - 2 * fc
        assert norms_of_fc == 0
        assert cost.lm_head_share == pytest.approx(
            2 * head.lm_head.weight.numel() / cost.bytes_per_draft_step
        )


class Whole(tuple):
    """`config.json` and `model.safetensors` of a sound head; short in hypothesis' reports."""

    def __repr__(self) -> str:
        return "<a sound head>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, bytes]:
    folder = saved(tmp_path_factory.mktemp("whole") / "h")
    files = (folder / "config.json", folder / "model.safetensors")
    return Whole(file.read_bytes() for file in files)


def check_survives(folder: Path, config: bytes, weights: bytes) -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    found = inspect_head(folder)
    json.dumps(found).encode()
    Console(quiet=True).print(describe(found))
    if not found["ok"]:
        return found
    load_head(folder)
    return found


def test_truncation_anywhere_is_seen(tmp_path, whole):
    config, weights = whole
    header = struct.unpack("<Q", weights[:8])[0]
    for cut in (0, 4, 8, 9, 8 + header - 1, 8 + header, 8 + header + 1, len(weights) - 1):
        assert not check_survives(tmp_path / "h", config, weights[:cut])["ok"], cut
    assert not check_survives(tmp_path / "h", config, weights + b"\0")["ok"]


FUZZ = settings(max_examples=60)


@FUZZ
@given(length=st.integers(0, 2**64 - 1), body=st.binary(max_size=64))
def test_hostile_header_sizes(tmp_path, whole, length, body):
    assert not check_survives(tmp_path / "h", whole[0], struct.pack("<Q", length) + body)["ok"]


@FUZZ
@given(st.data())
def test_a_changed_header_is_refused_or_changes_nothing(tmp_path, whole, data):
    config, weights = whole
    size = struct.unpack("<Q", weights[:8])[0]
    changed = bytearray(weights)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.integers(0, 255))
    if not check_survives(tmp_path / "h", config, bytes(changed))["ok"]:
        return
    read = load_head(tmp_path / "h").head.state_dict()
    check_survives(tmp_path / "h", config, weights)
    for name, tensor in load_head(tmp_path / "h").head.state_dict().items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize(
    "layers", [5, True, {"0": "full_attention"}, ["sliding_attention"], [["full_attention"]]]
)
def test_layer_types_other_than_full_attention(tmp_path, whole, layers):
    config = json.dumps(json.loads(whole[0]) | {"layer_types": layers})
    (problem,) = check_survives(tmp_path / "h", config.encode(), whole[1])["problems"]
    assert "layer_types" in problem
    config = json.dumps(json.loads(whole[0]) | {"layer_types": ["full_attention"]})
    assert check_survives(tmp_path / "h", config.encode(), whole[1])["ok"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


PINNED = {
    *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size", "draft_vocab_size"),
    *("eagle_aux_hidden_state_layer_ids", "norm_before_fc", "fc_norm"),
}
"""Keys of the configuration that have one right value, given the weights."""
FREE = {"rope_theta", "tie_word_embeddings", "dtype", "drafthead"}
"""Keys that the head does not depend on."""


@FUZZ
@given(st.data())
def test_any_value_in_the_config_is_refused_or_harmless(tmp_path, whole, data):
    config, right = json.loads(whole[0]), json.loads(whole[0])
    keys = data.draw(st.sets(st.sampled_from(sorted(config)), min_size=1, max_size=3))
    for key in keys:
        config[key] = data.draw(JSON)
    found = check_survives(tmp_path / "h", json.dumps(config).encode(), whole[1])
    # vLLM takes a flag that is null for one that is off.
    same = lambda key: config[key] == right[key] or (config[key] is None and right[key] is False)
    if not all(map(same, keys & PINNED)):
        assert not found["ok"]
    if keys <= FREE:
        assert found["ok"]
        read = load_head(tmp_path / "h").head.config
        check_survives(tmp_path / "h", *whole)
        assert read == load_head(tmp_path / "h").head.config


@FUZZ
@given(st.data())
def test_any_header_never_crashes(tmp_path, whole, data):
    size = struct.unpack("<Q", whole[1][:8])[0]
    header = json.loads(whole[1][8 : 8 + size])
    entry = st.fixed_dictionaries(
        {}, optional={"dtype": JSON, "shape": JSON, "data_offsets": JSON}
    ) | st.just({"dtype": "F32", "shape": [2**62, 4], "data_offsets": ["a", "b"]})
    tensors = sorted(set(header) - {"__metadata__"})
    for key in data.draw(st.sets(st.sampled_from(tensors), min_size=1, max_size=3)):
        header[key] = data.draw(entry | JSON)
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + whole[1][8 + size :]
    assert not check_survives(tmp_path / "h", whole[0], weights)["ok"]


@pytest.mark.parametrize(
    "config", [b"", b"[" * 100_000, b"1" * 5000, b"\xff\xfe", b'{"architectures": "\\ud800"}']
)
def test_configs_that_are_no_json(tmp_path, whole, config):
    assert not check_survives(tmp_path / "h", config, whole[1])["ok"]


def test_only_unfit_heads_are_refused_before_an_engine_starts(tmp_path, llama):
    target = load_target(llama)
    length = target.max_position_embeddings
    assert check_fit(saved(tmp_path / "fit", fitting(target)), target, length) == ([], [])
    with refused("vocab_size"):
        check_fit(saved(tmp_path / "other"), target, length)
    edit(tmp_path / "fit", model_type="qwen3")  # vLLM has such heads too
    unsupported, notes = check_fit(tmp_path / "fit", target, length)
    assert "model_type" in unsupported[0]
    assert not notes
    path = tmp_path / "fit" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with refused("model.safetensors"):
        check_fit(tmp_path / "fit", target, length)


def test_a_head_that_ends_before_the_engine(tmp_path, llama):
    target = load_target(llama)
    length = target.max_position_embeddings
    folder = saved(tmp_path / "h", fitting(target, max_position_embeddings=64))
    for notes in (inspect_head(folder, target)["notes"], check_fit(folder, target, length)[1]):
        said = next(note for note in notes if "max_position_embeddings" in note)
        assert "64" in said
        assert str(length) in said
    assert check_fit(folder, target, 64) == ([], [])


def test_linear_rope_makes_a_head_longer(tmp_path, llama):
    target = load_target(llama)
    head = fitting(
        target, max_position_embeddings=64, rope_scaling={"rope_type": "linear", "factor": 4.0}
    )
    assert check_fit(saved(tmp_path / "h", head), target, 256) == ([], [])
    assert "256" in check_fit(tmp_path / "h", target, 257)[1][0]


def test_defaults_are_those_of_transformers():
    """vLLM reads the configuration by transformers' class."""
    from transformers import LlamaConfig

    defaults = LlamaConfig()
    assert {name: getattr(defaults, name) for name in LLAMA} == LLAMA
