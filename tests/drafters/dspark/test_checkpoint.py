"""DSpark heads on disk: both formats, other people's dialects, and what is refused."""

import contextlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from drafthead.drafters.dspark.checkpoint import (
    load_head,
    mask_token,
    save_head,
)
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.drafter import DSpark
from drafthead.drafters.dspark.formats import read_config, write_config
from drafthead.errors import DraftheadError
from tests.drafters.dspark.heads import DRAFT, VOCAB, config, small_head
from tests.refused import refused

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS)


@pytest.mark.parametrize("format", ["vllm", "speculators"])
@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": VOCAB, "own_lm_head": False}])
def test_a_head_comes_back_as_it_was(tmp_path, format, changes):
    head = small_head(dtype=torch.bfloat16, **changes)
    save_head(head, tmp_path / "h", {"target": "t"}, format=format)
    loaded = load_head(tmp_path / "h")
    assert loaded.head.config == head.config
    assert loaded.about == {"target": "t"}
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.head.state_dict()[name], tensor), name


def changed(**changes):
    raw = write_config(config(), "vllm", {}, {})
    for name, value in changes.items():
        raw.pop(name) if value is None else raw.update({name: value})
    return raw


def specforge():
    """Markov's settings nested, the layers as outputs alone."""
    raw = changed(markov_rank=None, markov_head_type=None, eagle_aux_hidden_state_layer_ids=None)
    raw["dflash_config"]["markov_rank"] = 3
    return raw


def liquid():
    """Names of Liquid AI's published head: its architecture, RoPE's layout, no anchor setting."""
    raw = changed(
        architectures=["Lfm2DSparkDraftModel"],
        is_neox_style=None,
        sample_from_anchor=None,
        eagle_aux_hidden_state_layer_ids=None,
    )
    return raw | {"rope_is_neox_style": False}


def test_dialects_are_read():
    assert read_config(specforge(), "c") == config()
    assert read_config(liquid(), "c") == config(is_neox_style=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_layer_ids": [1, 2]}, "target_layer_ids"),
        ({"block_size": 4, "dspark_config": {"block_size": 7}}, "block_size"),
        ({"markov_head_type": "gated"}, "markov_head_type"),
        ({"sample_from_anchor": False}, "sample_from_anchor"),
        ({"markov_rank": None}, "markov_rank"),
        ({"mask_token_id": None, "dflash_config": {"target_layer_ids": [0, 1]}}, "mask_token_id"),
        ({"mask_token_id": VOCAB + 5, "dflash_config": {}}, "mask_token_id"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"layer_types": ["sliding_attention"]}, "sliding"),
        ({"architectures": ["LlamaForCausalLM"]}, "DSpark"),
        ({"dflash_config": [1]}, "dflash_config"),
    ],
)
def test_what_is_unclear_or_cannot_be_computed_is_refused(changes, named):
    with refused(named):
        read_config(changed(**changes), "c")


def broken(folder, change):
    save_head(small_head(), folder, {})
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("d2t"), "d2t"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
        (lambda t: t.update(d2t=torch.arange(DRAFT) * 2), "d2t"),
        (lambda t: t.update({"fc.weight": t["fc.weight"][:, :-1].contiguous()}), "fc.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra"),
        (lambda t: t["norm.weight"].fill_(torch.nan), "norm.weight"),
    ],
)
def test_broken_heads_are_refused(tmp_path, change, named):
    broken(tmp_path / "h", change)
    with refused(named):
        load_head(tmp_path / "h")


def test_more_drafts_than_the_block_are_refused(tmp_path):
    folder = tmp_path / "h"
    save_head(small_head(), folder, {})
    assert DSpark().speculative_config(str(folder), 4, "greedy")["num_speculative_tokens"] == 4
    with pytest.raises(DraftheadError) as error:
        DSpark().speculative_config(str(folder), 5, "greedy")
    assert error.value.field == "serve.num_speculative_tokens"


class _Tokenizer:
    """Ten tokens, the last three special."""

    eos_token_id, bos_token_id, unk_token_id = 9, None, None

    def __init__(self, **named: int):
        self.texts = {token: text for text, token in named.items()}
        token = type("Token", (), {"special": True})
        self.added_tokens_decoder = {7: token, 8: token, 9: token}

    def __len__(self):
        return 10

    def convert_ids_to_tokens(self, ids):
        return [self.texts.get(token, f"word{token}") for token in ids]


def test_the_mask_token_is_one_that_no_text_has():
    assert mask_token(_Tokenizer(), 16, lambda token: True) == 15
    assert mask_token(_Tokenizer(), 10, lambda token: token == 8) == 7
    # A vocabulary that is filled up: GGUF's [PAD…], Gemma's <unused…>, Llama 3's reserved ones.
    for filler in ("[PAD5]", "<unused5>", "<|reserved_special_token_5|>"):
        assert mask_token(_Tokenizer(**{filler: 5, "[PAD]": 6}), 10, lambda token: True) == 5
    with pytest.raises(DraftheadError):
        mask_token(_Tokenizer(**{"[PAD]": 6}), 10, lambda token: True)


def test_the_config_is_json_and_names_layers_in_both_ways():
    raw = json.loads(json.dumps(write_config(config(), "vllm", {}, {})))
    assert raw["eagle_aux_hidden_state_layer_ids"] == [1, 2]
    assert raw["target_layer_ids"] == raw["dflash_config"]["target_layer_ids"] == [0, 1]


@given(st.sampled_from(sorted(write_config(config(), "vllm", {}, {}))), VALUES)
def test_any_value_in_a_config_is_read_or_refused(name, value):
    with contextlib.suppress(DraftheadError):
        read = read_config(changed() | {name: value}, "c")
        assert isinstance(read, DSparkConfig)
