"""What a prediction beside served figures may be over: the text that is served, or none."""

import numpy as np
import pytest
import torch

from drafthead.data.answers import Answer, write_part
from drafthead.fsio import write_json
from drafthead.prove.bench import grid
from drafthead.prove.prediction import (
    Rehearsal,
    by_vocabulary,
    expected_acceptance,
    predicted_curves,
    predicted_over_served,
)
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import Sample, StateWriter, StoreMeta
from drafthead.targets import load_target
from drafthead.vocab import save_vocab
from tests.prove import crafted


def _recipe(**sections):
    base = {
        "name": "r",
        "target": {"path": "somewhere"},
        "prompts": {"sources": [{"path": "prompts.jsonl"}]},
        "generate": {"max_new_tokens": 64},
        "bench": {"max_new_tokens": 64},
    }
    return parse_recipe(base | sections, "recipe")


def test_no_prediction_over_other_text(tmp_path):
    run = RunDir(tmp_path)
    run.states.mkdir()
    (run.states / "meta.json").write_text("{}")
    for recipe in (
        _recipe(generate={"max_new_tokens": 64, "temperature": 0.7}),
        _recipe(generate={"max_new_tokens": 63}),
        _recipe(bench={"max_new_tokens": 64, "temperature": [0.5]}),
        _recipe(bench={"max_new_tokens": 64, "sources": [{"path": "code.jsonl"}]}),
    ):
        assert predicted_over_served(Rehearsal(recipe, run, None, grid(recipe)[0])) is None
    rehearsal = Rehearsal(_recipe(), run, None, grid(_recipe())[0])
    assert rehearsal.of_answers(63).possible
    assert not rehearsal.of_answers(65).possible


def test_no_prediction_without_states(tmp_path):
    recipe = _recipe()
    assert predicted_over_served(Rehearsal(recipe, RunDir(tmp_path), None, grid(recipe)[0])) is None


@pytest.mark.parametrize(
    ("bench", "expected", "curves"),
    [
        ({}, [0.5, 0.2, 0.1], [[0.6], [0.5, 0.2], [0.5, 0.2, 0.1]]),
        ({"temperature": [0.7, 0.0]}, None, [[0.6], [0.5, 0.2], [0.5, 0.2, 0.1]]),
        ({"sources": [{"path": "code.jsonl"}]}, None, None),
    ],
)
def test_what_training_evaluated_is_no_prediction_of_other_text(tmp_path, bench, expected, curves):
    run = RunDir(tmp_path)
    rates = {1: [0.6], 2: [0.5, 0.2], 3: [0.5, 0.2, 0.1]}
    heldout = [{"k": k, "acceptance_by_position": found} for k, found in rates.items()]
    write_json(run.train / "best.json", {"heldout": heldout})
    recipe = _recipe(bench=bench)
    rehearsal = Rehearsal(recipe, run, None, grid(recipe)[0])
    assert expected_acceptance(rehearsal) == expected
    assert predicted_curves(rehearsal, 7) == curves


def test_a_smaller_vocabulary_is_tried_out(tmp_path):
    """The crafted head repeats what it reads: right for an answer of one token, as long as that
    token may be drafted. Here it is 50, among the 150 most frequent and not among the 75."""
    target_folder = crafted.target(tmp_path / "target")
    target = load_target(target_folder)
    run = RunDir(tmp_path / "r")
    crafted.head(run.head, target_folder)
    counts = np.zeros(target.vocab_size, np.int64)
    counts[: crafted.DRAFT_VOCAB] = 10
    counts[100:200] = 1000
    counts[50] = 900
    counts[[*range(120, 150)]] = 5  # so that 50 is the 71st of the 100 … 199 and itself
    counts[200:210] = 950
    save_vocab(run.vocab, counts, crafted.DRAFT_VOCAB, [4])
    ids = torch.tensor([1, 7] + [50] * 20, dtype=torch.int32)
    states = torch.zeros(21, 4, crafted.HIDDEN)
    states[:, 0] = target.embedding().float()[ids[:-1].long()]
    meta = StoreMeta((1, 2, 3), target.num_layers, crafted.HIDDEN, "fp32", 1, {"target": "t"})
    mask = torch.arange(22) >= 2
    with StateWriter(run.states, meta) as writer:
        writer.submit(0, [Sample(ids, mask, states, 3, 2, "c", "heldout")], {})
    none = np.zeros(0, np.int32)
    prompt = np.array([1, 7], np.int32)
    write_part(
        run.answers, 0, [Answer("c", "s", "heldout", prompt, none > 0, none, "stop", "")], {}
    )
    recipe = _recipe(target={"path": str(target_folder)})
    rehearsal = Rehearsal(recipe, run, target, grid(recipe)[0])
    curves = predicted_curves(rehearsal, 3)
    assert by_vocabulary(rehearsal, None) is None
    found = by_vocabulary(rehearsal, curves)
    assert list(found) == [75, 150, 300, 512]
    assert found[75] == [[0.0], [0.0, 0.0], [0.0, 0.0, 0.0]]
    # Six steps: the first repeats the prompt's end, the last reaches past the answer.
    assert found[150][2] == pytest.approx([5 / 6, 5 / 6, 4 / 6])
    assert found[150] == found[300] == found[512] == curves
    given = recipe.train.model_copy(update={"start_from": "a/head/of/another/run"})
    rehearsal.recipe = recipe.model_copy(update={"train": given})
    assert by_vocabulary(rehearsal, curves) is None, "its vocabulary is not the one counted here"
