"""The draft vocabulary: what is in, in what order, and how much it covers."""

import json

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from drafthead import vocab
from drafthead.data.answers import Answer, write_part
from drafthead.head.model import check_d2t
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from tests.refused import refused
from tests.tiny import tiny_tokenizer


def test_counts_are_of_every_array():
    counts = vocab.count_tokens([np.array([1, 1, 3], np.int32), np.array([], np.int32)], 5)
    assert counts.tolist() == [0, 2, 0, 1, 0]


def test_ids_of_another_target_are_refused():
    with refused("4..9", 9):
        vocab.count_tokens([np.array([4, 9])], 9)


def test_most_frequent_first_ties_by_lower_id():
    assert vocab.choose(np.array([0, 5, 2, 2, 2, 9]), 4, []).tolist() == [1, 2, 3, 5]


def test_special_tokens_are_in_even_if_never_written():
    assert vocab.choose(np.array([7, 5, 0, 3, 0]), 3, [4]).tolist() == [0, 1, 4]


def test_too_large_and_too_small():
    with refused("vocab.size", 5, 4):
        vocab.choose(np.zeros(4), 5, [])
    with refused("vocab.size", 2, 3):
        vocab.choose(np.zeros(4), 2, [0, 1, 2])


@given(st.data())
def test_any_choice_is_a_valid_map(data):
    counts = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=40)), np.int64)
    always = data.draw(st.sets(st.integers(0, len(counts) - 1)))
    size = data.draw(st.integers(max(1, len(always)), len(counts)))
    chosen = vocab.choose(counts, size, always)
    d2t = vocab.offsets(chosen)
    check_d2t(d2t, size, len(counts))
    assert set(always) <= set(chosen.tolist())
    left = np.delete(counts, chosen)
    free = [c for i, c in zip(chosen, counts[chosen]) if i not in always]
    assert not len(left) or not free or min(free) >= left.max()
    curve = [point["coverage"] for point in vocab.coverage_curve(counts, always, size)]
    assert curve[-1] == 1.0
    assert vocab.coverage(counts, chosen) in curve or counts.sum() == 0


def test_what_is_written(tmp_path):
    counts = np.array([1, 9, 0, 4, 0, 6])
    about = vocab.save_vocab(tmp_path / "vocab", counts, 3, [4])
    tensors = load_file(tmp_path / "vocab" / "vocab.safetensors")
    assert tensors["d2t"].dtype == torch.int64
    assert (torch.arange(3) + tensors["d2t"]).tolist() == [1, 4, 5]
    assert tensors["t2d"].tolist() == [False, True, False, False, True, True]
    assert tensors["counts"].tolist() == counts.tolist()
    assert about == json.loads((tmp_path / "vocab" / "coverage.json").read_text())
    assert about["coverage"] == 15 / 20


def test_special_tokens_come_from_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    inside = vocab.always_in(tokenizer, [7])
    names = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert inside == {7, *tokenizer.convert_tokens_to_ids(names)}


def test_the_stage_counts_what_the_target_wrote(tmp_path, llama):
    def answer(split, prompt, mask, ids):
        return Answer(
            "c", "s", split, np.array(prompt, np.int32), np.array(mask, bool), np.array(ids), "", ""
        )

    run = RunDir(tmp_path / "run")
    parts = [
        answer("train", [50, 60, 61], [False, True, True], [60, 70, 4]),
        answer("heldout", [90], [False], [91, 60, 60, 70]),
    ]
    write_part(run.answers, 0, parts, {})
    recipe = parse_recipe(
        {
            "name": "x",
            "target": {"path": str(llama)},
            "prompts": {"sources": [{"path": "none.jsonl"}]},
            "vocab": {"size": 7},
        },
        "recipe",
    )
    about = vocab.vocab(recipe, run, console=Console(quiet=True))
    tensors = load_file(run.vocab / "vocab.safetensors")
    assert tensors["counts"].nonzero().flatten().tolist() == [4, 60, 61, 70]
    assert tensors["t2d"].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 60, 61]
    assert about["coverage"] == 4 / 5
    assert about["heldout_coverage"] == 2 / 4
