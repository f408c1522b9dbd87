"""Which engine serves which head: heads in every dialect are read, converted, or refused."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafthead.drafters import engines
from drafthead.drafters.dspark import checkpoint as dspark
from drafthead.drafters.export import convert_head
from drafthead.drafters.inspect import check_fit, inspect_head
from drafthead.drafters.support import commands, tables
from drafthead.errors import DraftheadError, UnsupportedHead
from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.formats import AUX_IDS, Provenance
from drafthead.targets import load_target
from tests.drafters.dspark import heads as dspark_heads
from tests.heads import small_head
from tests.refused import refused

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


@pytest.fixture(scope="module")
def target(llama):
    return load_target(llama)


def eagle3(folder, target, *, format="vllm", **changes):
    """A head of the target's widths that every engine could serve."""
    shape = {
        "hidden_size": 64,
        "target_hidden_size": 64,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": 100,
        "aux_layer_ids": (1, 2, 4),
        "max_position_embeddings": target.max_position_embeddings,
    }
    head = small_head(**shape | changes)
    save_head(head, folder, Provenance(), format=format)
    return folder, head


def dspark_head(folder, target, *, format="vllm", **changes):
    shape = {
        "hidden_size": 64,
        "target_hidden_size": 64,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size,
        "mask_token_id": target.vocab_size - 1,
        "aux_layer_ids": (1, 2, 4),
        "max_position_embeddings": target.max_position_embeddings,
        "num_target_layers": target.num_layers,
        "own_lm_head": False,
    }
    head = dspark_heads.small_head(dtype=torch.bfloat16, **shape | changes)
    if head.config.draft_vocab_size < target.vocab_size:
        head.d2t[:] = torch.arange(len(head.d2t))  # every second id
    dspark.save_head(head, folder, {}, format=format)
    return folder, head


def edit(folder, config=lambda raw: None, names=lambda name: name):
    """Change config.json and the tensors' names."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    config(raw)
    path.write_text(json.dumps(raw))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if any(names(name) != name for name in tensors):
        save_file({names(name): tensor for name, tensor in tensors.items()}, file)


def without(*names, **changes):
    def change(raw):
        for name in names:
            raw.pop(name, None)
        raw.update(changes)

    return change


def specforge_dspark(raw):
    """configs/qwen3-8b-dspark.json of SpecForge a6b6b02, its keys in its places."""
    inner = {
        "attention_mode": "gqa",
        "confidence_head_alpha": 1.0,
        "projector_type": "dspark",
        "target_layer_ids": raw["target_layer_ids"],
    }
    for name in ("confidence_head_with_markov", "enable_confidence_head", "markov_head_type"):
        inner[name] = raw.pop(name)
    inner |= {name: raw.pop(name) for name in ("markov_rank", "mask_token_id")}
    drop = ("draft_vocab_size", "target_hidden_size", "target_layer_ids", AUX_IDS)
    without(*drop, "sample_from_anchor", "is_neox_style", "rope_is_neox_style")(raw)
    raw |= {"architectures": ["DSparkDraftModel"], "dflash_config": inner, "num_target_layers": 6}


def modelopt_dspark(raw):
    """What DSparkExporter of ModelOpt 0.47 writes."""
    specforge_dspark(raw)
    inner = raw["dflash_config"]
    without("attention_mode", "confidence_head_alpha", "confidence_head_with_markov")(inner)
    inner |= {"use_confidence_head": inner.pop("enable_confidence_head"), "shift_label": True}
    raw |= {"architectures": ["DFlashDraftModel"], "rope_scaling": None}


def modelopt_names(name):
    name = name.replace("confidence_head.proj", "confidence_proj")
    return name.replace("markov_head.", "")


def liquid(raw):
    """LiquidAI/LFM2.5-2.6B-DSpark's keys."""
    inner = {"num_target_layers": 6, "mask_token_id": raw.pop("mask_token_id")}
    inner["target_layer_ids"] = raw.pop("target_layer_ids")
    drop = ("draft_vocab_size", "target_hidden_size", AUX_IDS, "sample_from_anchor")
    without(*drop, "is_neox_style", "confidence_head_with_markov", "rope_parameters")(raw)
    raw |= {"architectures": ["Lfm2DSparkDraftModel"], "dflash_config": inner}


def modelopt_eagle3(raw):
    """What EagleExporter of ModelOpt 0.47 writes: outputs of layers, in eagle_config alone."""
    without(AUX_IDS, "target_hidden_size")(raw)
    raw["eagle_config"] |= {"use_last_layernorm": True, "use_mtp_layernorm": False}


def flags_off(raw):
    for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        raw.pop(flag)


# Each dialect: what makes a head of it, and the engines that serve it as it is; the first two are
# what drafthead writes. Layers 1, 2, 4 are not the default of a target of six layers.
DIALECTS = {
    "vLLM": (eagle3, {}, lambda f: None, "vllm sglang llama.cpp tensorrt-llm"),
    "vLLM, DSpark": (dspark_head, {}, lambda f: None, "vllm sglang llama.cpp"),
    "vLLM's older name": (
        eagle3,
        {},
        lambda f: edit(f, without(architectures=["Eagle3LlamaForCausalLM"], eagle_config={})),
        "vllm llama.cpp tensorrt-llm",
    ),
    "speculators": (eagle3, {"format": "speculators"}, lambda f: None, "vllm llama.cpp"),
    "speculators, DSpark": (
        dspark_head,
        {"format": "speculators"},
        lambda f: None,
        "vllm llama.cpp",
    ),
    "ModelOpt": (eagle3, {}, lambda f: edit(f, modelopt_eagle3), "sglang tensorrt-llm"),
    "transformers' prefix": (eagle3, {}, lambda f: edit(f, names="model.{}".format), ""),
    "SpecForge, DSpark": (
        dspark_head,
        {},
        lambda f: edit(f, specforge_dspark),
        "sglang llama.cpp",
    ),
    "ModelOpt, DSpark": (
        dspark_head,
        {},
        lambda f: edit(f, modelopt_dspark, modelopt_names),
        "",
    ),
    "Liquid": (
        dspark_head,
        {"is_neox_style": False},
        lambda f: edit(f, liquid),
        "sglang llama.cpp",
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_are_read_and_converted(tmp_path, target, dialect):
    make, changes, spoil, serving = DIALECTS[dialect]
    folder, head = make(tmp_path / "h", target, **changes)
    spoil(folder)
    about = inspect_head(folder, target)
    assert about["unsupported"] == []
    assert {name for name, can in about["engines"].items() if can["serves"]} == {*serving.split()}
    assert about["ok"] == ("vllm" in serving)
    # As bench and serve look at it, which take what inspect finds no fault with.
    with nullcontext() if about["ok"] else refused("drafthead convert"):
        check_fit(folder, target, target.max_position_embeddings)
    found = convert_head(folder, tmp_path / "out", target=target)
    assert found["ok"]
    assert found["engines"]["vllm"]["serves"]
    assert found["engines"]["sglang"]["serves"]
    load = load_head if make is eagle3 else dspark.load_head
    converted = load(tmp_path / "out").head
    assert converted.config == head.config
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name].to(tensor.dtype)), name


REFUSED = {
    "layers that could be either": (
        eagle3,
        lambda f: edit(f, without(AUX_IDS)),
        DraftheadError,
        "config.json, outputs, inputs",
    ),
    "two kinds of layers": (
        eagle3,
        lambda f: edit(f, without(eagle_config={AUX_IDS: [1, 3, 4]})),
        DraftheadError,
        "config.json, inputs, outputs",
    ),
    "RoPE both ways": (
        dspark_head,
        lambda f: edit(f, without(rope_is_neox_style=False)),
        DraftheadError,
        "is_neox_style, rope_is_neox_style",
    ),
    "an anchor that drafts and does not": (
        dspark_head,
        lambda f: edit(f, without(dspark_bonus_anchor=True)),
        DraftheadError,
        "sample_from_anchor, dspark_bonus_anchor",
    ),
    "SpecForge's or DeepSeek's": (
        dspark_head,
        lambda f: edit(f, without("model_type", architectures=["DSparkDraftModel"])),
        DraftheadError,
        "SpecForge's, model_type",
    ),
    "DFlash or DSpark": (
        dspark_head,
        lambda f: edit(f, without(architectures=["DFlashDraftModel"], dflash_config={})),
        DraftheadError,
        "markov_rank, dflash_config.projector_type",
    ),
    "a gated Markov head": (
        dspark_head,
        lambda f: edit(f, without(markov_head_type="gated")),
        UnsupportedHead,
        "gated",
    ),
    "z-lab, DFlash": (
        dspark_head,
        lambda f: edit(
            f, without("markov_rank", architectures=["DFlashDraftModel"], dflash_config={})
        ),
        UnsupportedHead,
        "DFlash",
    ),
    "P-EAGLE": (
        eagle3,
        lambda f: edit(f, without(speculators_model_type="peagle")),
        UnsupportedHead,
        "peagle",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_mean_two_things_or_has_no_conversion_is_refused(tmp_path, target, case):
    make, spoil, error, names = REFUSED[case]
    spoil(make(tmp_path / "h", target)[0])
    with refused(*names.split(", ")) as raised:
        convert_head(tmp_path / "h", tmp_path / "out", target=target)
    assert type(raised.value) is error
    assert not (tmp_path / "out").exists()
    about = inspect_head(tmp_path / "h", target)
    assert not about["ok"]
    serves = None if error is UnsupportedHead else False
    assert about["engines"]["vllm"]["serves"] is serves


@pytest.mark.parametrize(("meaning", "layers"), [("outputs", (1, 2, 4)), ("inputs", (0, 1, 3))])
def test_the_user_says_what_layers_mean(tmp_path, target, meaning, layers):
    folder, _ = eagle3(tmp_path / "h", target)
    edit(folder, without(AUX_IDS))
    convert_head(folder, tmp_path / "out", target=target, layer_ids=meaning)
    assert load_head(tmp_path / "out").head.config.aux_layer_ids == layers
    with pytest.raises(DraftheadError) as error:  # here it is clear
        convert_head(tmp_path / "out", tmp_path / "again", layer_ids=meaning)
    assert error.value.field == AUX_IDS


def test_convert_overwrites_nothing(tmp_path, target):
    folder, _ = eagle3(tmp_path / "h", target)
    before = (folder / "config.json").read_text()
    with pytest.raises(DraftheadError):
        convert_head(folder, folder)
    assert (folder / "config.json").read_text() == before


# A head that an engine serves, and what it does not serve for one change: words of each limit.
CHANGES = {
    "norm_before_residual": (eagle3, {"norm_before_residual": True}, "sglang tensorrt-llm"),
    "fc_norm": (eagle3, {"fc_norm": True}, "llama.cpp mlx"),
    "norm_output": (eagle3, {"norm_output": True}, "llama.cpp mlx"),
    "norm_before_fc": (eagle3, {"norm_before_fc": True}, ""),
    "two layers": (eagle3, {"num_hidden_layers": 2}, "sglang llama.cpp tensorrt-llm"),
    "four aux layers": (eagle3, {"aux_layer_ids": (1, 2, 3, 4)}, "llama.cpp mlx"),
    "the embedding's output": (eagle3, {"aux_layer_ids": (0, 2, 4)}, "mlx"),
    "biases": (eagle3, {"attention_bias": True}, "sglang llama.cpp"),
    "reduced": (dspark_head, {"draft_vocab_size": 100, "own_lm_head": True}, "sglang mlx"),
    "own LM head": (dspark_head, {"own_lm_head": True}, "sglang mlx llama.cpp"),
    "plain confidence": (dspark_head, {"confidence_with_markov": False}, "llama.cpp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_costs(tmp_path, target, change):
    """Without a target, or what only a target tells would count, too."""
    make, changes, lost = CHANGES[change]

    def why(folder):
        can = inspect_head(folder)["engines"]
        return {(name, words) for name in can for words in can[name]["why"]}

    plain = why(make(tmp_path / "plain", target)[0])
    more = why(make(tmp_path / "h", target, **changes)[0]) - plain
    assert {name for name, _ in more} == {*lost.split()}


def test_hooks_of_targets(tmp_path, lfm2_moe):
    """LFM2: no EAGLE-3 in SGLang; mlx-vlm and SGLang draft by DSpark."""
    target = load_target(lfm2_moe)
    folder, _ = eagle3(tmp_path / "e", target)
    assert not inspect_head(folder, target)["engines"]["sglang"]["serves"]
    assert "--target" in inspect_head(folder)["engines"]["sglang"]["notes"][0]
    folder, _ = dspark_head(tmp_path / "d", target)
    can = inspect_head(folder, target)["engines"]
    assert [name for name in can if can[name]["serves"]] == ["vllm", "sglang", "llama.cpp", "mlx"]


def test_the_last_layers_output_needs_a_target_that_gives_it(tmp_path, target, lfm2_moe):
    folder, _ = dspark_head(tmp_path / "h", target, aux_layer_ids=(1, 2, 6))
    for model, serves in ((target, False), (load_target(lfm2_moe), True)):
        assert inspect_head(folder, model)["engines"]["sglang"]["serves"] is serves


def test_what_an_engine_does_not_compute_is_not_converted(tmp_path, target):
    folder, _ = eagle3(tmp_path / "h", target, norm_before_residual=True)
    with refused("norm_before_residual") as error:
        convert_head(folder, tmp_path / "out", target=target, engine="sglang")
    assert error.value.field == "for"
    assert not (tmp_path / "out").exists()


def test_mlx_gets_a_layout_of_its_own(tmp_path, lfm2_moe):
    target = load_target(lfm2_moe)
    folder, _ = eagle3(tmp_path / "e", target)
    assert not inspect_head(folder, target)["engines"]["mlx"]["serves"]
    found = convert_head(folder, tmp_path / "out", target=target, engine="mlx")
    assert found["engines"]["mlx"]["serves"]
    assert found["engines"]["vllm"]["serves"]
    loaded = load_head(tmp_path / "out")
    assert torch.equal(loaded.embedding, target.embedding().bfloat16())


def test_an_lm_head_that_is_the_targets_is_left_to_it(tmp_path, target):
    folder, head = dspark_head(tmp_path / "h", target, own_lm_head=True)
    with torch.no_grad():
        head.lm_head.weight.copy_(target.lm_head())
    dspark.save_head(head, folder, {})
    assert not inspect_head(folder, target)["engines"]["sglang"]["serves"]
    found = convert_head(folder, tmp_path / "out", target=target)
    assert found["engines"]["sglang"]["serves"]
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_every_limit_is_known_with_its_source():
    for limit in engines.LIMITS:
        assert limit.engine in engines.ENGINES
        assert limit.source
        assert not (limit.layout and limit.fix)


@pytest.mark.parametrize("engine", [name for name in engines.ENGINES if name != "vllm"])
def test_commands_quote_and_name_both_models(tmp_path, target, engine):
    about = inspect_head(eagle3(tmp_path / "h", target)[0])
    text = "\n".join(commands(engine, about, "my target", "my head", 3))
    assert "'my target'" in text
    assert "'my head'" in text


def test_the_page_is_made_from_the_table():
    """To write it anew: what `support.tables()` returns, to the end of the page."""
    assert tables() in PAGE.read_text(encoding="utf-8")
