import json
from dataclasses import replace

import pytest
import torch

from benchmarks.capture.compare_states import _spread, compare, compare_stores, main
from drafthead.capture.checks import teacher_argmax
from drafthead.errors import DraftheadError
from drafthead.states import Sample, StateWriter, StoreMeta
from drafthead.targets import load_target
from tests.refused import refused


def sample(target, seed, length=40):
    """A sequence whose tokens are just those that its states call for."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(length - 1, 3, target.hidden_size, generator=g)
    norm, eps = target.final_norm()
    ids = torch.zeros(length, dtype=torch.int32)
    ids[1:] = teacher_argmax(states[:, -1], norm, eps, target.lm_head()).int()
    return Sample(ids, torch.arange(length) >= 10, states, 2, 10, f"c{seed}", "train")


def test_what_differs_is_counted_where_it_differs(llama):
    target = load_target(llama)
    first = [sample(target, seed) for seed in range(3)]
    same = compare(zip(first, first), target)
    assert same["positions"] == 90  # tokens 10 to 39 of three
    assert same["teacher_differs"] == 0
    assert same["served"] == [1, 1]
    assert [d["median"] for d in same["distance"]] == [0, 0, 0]
    other = [replace(s, states=s.states.clone()) for s in first]
    other[1].states[20, 2] *= -1  # predicts token 21 of the second
    other[1].states[:, 1] *= 1.5
    other[2].states[3, 2] *= -1  # in the prompt: no position of the answer
    found = compare(zip(first, other), target)
    assert found["teacher_differs"] == pytest.approx(1 / 90)
    assert found["served"] == [1, pytest.approx(89 / 90)]
    assert found["distance"][0] == {"median": 0, "p99": 0}
    assert found["distance"][1]["p99"] == pytest.approx(0.5)
    assert found["distance"][2]["median"] == 0


def test_distances_of_any_number_of_positions_have_quantiles():
    """PyTorch's refuse more than 16 million."""
    distances = torch.arange(2.0**24 + 1)[:, None]
    assert _spread(distances) == [{"median": 2**23, "p99": pytest.approx(0.99 * 2**24)}]


def test_other_tokens_are_refused(llama):
    target = load_target(llama)
    with refused("c0", "c1"):
        compare([(sample(target, 0), sample(target, 1))], target)
    with pytest.raises(DraftheadError):
        compare([], target)


def test_states_of_another_target_are_refused(llama, tmp_path):
    target = load_target(llama)
    for name, captured in (("a", "another"), ("b", "one more"), ("c", target.fingerprint)):
        size = (target.num_layers, target.hidden_size)
        meta = StoreMeta((1, 2), *size, "fp32", 1, {"target": captured})
        with StateWriter(tmp_path / name, meta) as writer:
            writer.submit(0, [sample(target, 0)])
    with refused("--target"):
        compare_stores(tmp_path / "a", tmp_path / "b", target)
    assert compare_stores(tmp_path / "a", tmp_path / "c", target)["conversations"] == 1


def test_the_script_pairs_two_stores_by_conversation(llama, tmp_path, capsys):
    target = load_target(llama)
    samples = [sample(target, seed) for seed in range(5)]
    other = replace(samples[4], ids=samples[4].ids.flip(0))
    for name, encoding, order in (("a", "fp32", [0, 1, 2]), ("b", "fp8", [3, 2, 1])):
        meta = StoreMeta((1, 2), target.num_layers, target.hidden_size, encoding, 1, {})
        with StateWriter(tmp_path / name, meta) as writer:
            parted = samples[4] if name == "a" else other
            writer.submit(0, [*(samples[i] for i in order), parted])
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--target", str(llama)])
    shown = capsys.readouterr()
    assert "left out: 1 conversations whose answers differ" in shown.err
    found = json.loads(shown.out)
    assert (found["conversations"], found["other_answers"]) == (2, 1)
    assert found["positions"] == 60
    assert 0 < found["distance"][0]["median"] < 0.05
