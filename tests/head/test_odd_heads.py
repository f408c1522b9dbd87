"""Heads in others' dialects: what vLLM serves is read, what it stumbles over is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafthead.drafters.inspect import inspect_head
from drafthead.head.checkpoint import load_head
from drafthead.targets import load_target
from tests.heads import small_head
from tests.odd_heads import SERVED, STUMBLES, shards, write
from tests.refused import refused


def head_for(target, **changes):
    shape = {
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "head_dim": 32,
        "max_position_embeddings": target.max_position_embeddings,
        "aux_layer_ids": (1, 2, 4),
    }
    return small_head(**shape | changes)


@pytest.fixture(scope="module")
def target(llama):
    return load_target(llama)


@pytest.mark.parametrize("case", SERVED)
def test_what_vllm_serves_is_read(tmp_path, target, case):
    head = head_for(target)
    folder = write(tmp_path / "h", head, *SERVED[case])
    about = inspect_head(folder, target)
    assert (about["problems"], about["unsupported"]) == ([], [])
    read = load_head(folder, target).head
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(
            read.get_parameter(name).float(), parameter, rtol=0.01, atol=0.01
        )
    assert torch.equal(read.d2t, head.d2t)


def test_what_the_dialects_mean(tmp_path, target):
    def config_of(case):
        head = head_for(target)
        return load_head(write(tmp_path / case, head, *SERVED[case]), target).head.config

    assert config_of("flags of null, speculators").norm_before_residual is False
    assert config_of("two thetas").rope_theta == 10000.0
    assert config_of("older rope").rope_theta == 5e5
    assert config_of("older rope").rope_scaling["rope_type"] == "llama3"
    assert config_of("speculators' default window").window(0) == 2048
    assert config_of("a window of null").window(0) is None


@pytest.mark.parametrize("case", STUMBLES)
def test_what_vllm_stumbles_over_is_said(tmp_path, target, case):
    *changes, name = STUMBLES[case]
    folder = write(tmp_path / "h", head_for(target), *changes)
    assert any(name in problem for problem in inspect_head(folder, target)["problems"])
    load_head(folder, target)  # training can go on from it all the same


def test_shards_with_an_index(tmp_path, target):
    head = head_for(target)
    folder = write(tmp_path / "h", head, {}, None, "vllm")
    shards(folder)
    assert inspect_head(folder, target)["problems"] == []
    assert torch.equal(load_head(folder).head.fc.weight, head.fc.weight.bfloat16())
    next(folder.glob("*-00002-of-*.safetensors")).unlink()
    assert "00002" in inspect_head(folder, target)["problems"][0]


@pytest.mark.parametrize("within", [True, False], ids=["within the vocabulary", "beyond it"])
def test_target_ids_in_place_of_offsets(tmp_path, target, within):
    ids = torch.arange(23) * 2 + (0 if within else target.vocab_size - 46)
    marked = torch.zeros(target.vocab_size, dtype=torch.bool)
    marked[ids] = True
    put = lambda tensors: tensors | {"d2t": ids, "t2d": marked}
    folder = write(tmp_path / "h", head_for(target), {}, put, "vllm")
    (problem,) = inspect_head(folder, target)["problems"]
    assert "d2t" in problem
    assert "arange" in problem  # how to convert it
    with refused("d2t"):
        load_head(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["d2t"] -= torch.arange(len(tensors["d2t"]))
    save_file(tensors, file)
    assert inspect_head(folder, target)["problems"] == []


def test_target_ids_without_t2d_are_a_suspicion(tmp_path, target):
    head = head_for(target)
    head.set_vocab(torch.arange(23))  # to the target ids 0, 2, 4, …
    drop = lambda tensors: {name: t for name, t in tensors.items() if name != "t2d"}
    folder = write(tmp_path / "h", head, {}, drop, "vllm")
    about = inspect_head(folder, target)
    assert about["problems"] == []
    assert any("d2t" in note for note in about["notes"])


def test_offsets_that_a_type_rounds(tmp_path, target):
    wide = small_head(
        hidden_size=64,
        target_hidden_size=64,
        vocab_size=512,
        head_dim=32,
        draft_vocab_size=150,
    )
    wide.set_vocab(torch.full((150,), 301))
    round_off = lambda tensors: tensors | {"d2t": tensors["d2t"].bfloat16()}
    folder = write(tmp_path / "h", wide, {}, round_off, "vllm")
    (problem,) = inspect_head(folder)["problems"]
    assert "BF16" in problem
    wide.set_vocab(torch.full((150,), 200))  # which bfloat16 holds
    folder = write(tmp_path / "h", wide, {}, round_off, "vllm")
    assert inspect_head(folder)["problems"] == []
    assert torch.equal(load_head(folder).head.d2t, wide.d2t)


def test_an_lm_head_left_to_the_target(tmp_path, target):
    whole = head_for(target, draft_vocab_size=target.vocab_size)
    drop = lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    folder = write(tmp_path / "h", whole, {}, drop, "vllm")
    assert inspect_head(folder, target)["problems"] == []
    read = load_head(folder, target).head
    assert torch.equal(read.lm_head.weight, target.lm_head().bfloat16())
    with refused("lm_head.weight"):
        load_head(folder)


@pytest.mark.parametrize("same", [True, False])
def test_an_lm_head_tied_to_the_heads_own_embedding(tmp_path, target, same):
    """vLLM does not tie them, it takes the target's LM head."""
    own = target.lm_head().bfloat16() if same else torch.ones(target.vocab_size, 64)

    def tie(tensors):
        del tensors["lm_head.weight"]
        return tensors | {"embed_tokens.weight": own}

    whole = head_for(target, draft_vocab_size=target.vocab_size)
    folder = write(tmp_path / "h", whole, {"tie_word_embeddings": True}, tie, "vllm")
    problems = inspect_head(folder, target)["problems"]
    assert bool(problems) != same
    assert all("tie_word_embeddings" in problem for problem in problems)


def test_a_wrong_number_of_layers_is_told_once(tmp_path, target):
    folder = write(tmp_path / "h", head_for(target), {"num_hidden_layers": 32}, None, "vllm")
    problems = inspect_head(folder, target)["problems"]
    assert len(problems) <= 3
    assert "num_hidden_layers" in problems[0]
    assert max(map(len, problems)) < 600


def test_a_missing_field_has_no_default_in_speculators_format(tmp_path):
    folder = write(tmp_path / "h", small_head(), {}, None, "speculators")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["transformer_layer_config"]["rms_norm_eps"]
    path.write_text(json.dumps(config))
    (problem,) = inspect_head(folder)["problems"]
    assert "rms_norm_eps" in problem


@pytest.mark.parametrize("kind", ["peagle", "dflash", "mtp"])
def test_other_drafters_of_speculators_are_unsupported(tmp_path, kind):
    folder = write(
        tmp_path / "h", small_head(), {"speculators_model_type": kind}, None, "speculators"
    )
    about = inspect_head(folder)
    assert about["problems"] == []
    assert "speculators_model_type" in about["unsupported"][0]
