"""The two-sample test: as many false alarms as it says, and it finds what it says it would."""

import numpy as np
import pytest

from drafthead.prove import sampling_test
from drafthead.prove.sampling_test import two_sample

CONTEXTS, N, LENGTH, VOCAB = 3, 150, 3, 30


def draw(rng, tilt=0.0):
    """Answers of a made language model; ``tilt`` of the tokens go to the likeliest."""
    language = np.random.default_rng(7)
    found = []
    for _ in range(CONTEXTS):
        p = language.dirichlet(np.full(VOCAB, 0.3), LENGTH)
        tokens = np.stack([rng.choice(VOCAB, N, p=p[j]) for j in range(LENGTH)], axis=1)
        replace = rng.random(tokens.shape) < tilt
        found.append(np.where(replace, p.argmax(axis=1), tokens))
    return found


@pytest.fixture(autouse=True)
def fewer_permutations(monkeypatch):
    monkeypatch.setattr(sampling_test, "PERMUTATIONS", 200)
    monkeypatch.setattr(sampling_test, "ALPHA", 0.01)


def test_same_distribution_gives_uniform_p_values():
    rng = np.random.default_rng(1)
    p = [two_sample(draw(rng), draw(rng), seed=i).p_value for i in range(40)]
    assert 0.35 < np.mean(p) < 0.65
    assert sum(value < sampling_test.ALPHA for value in p) <= 2
    assert np.mean(np.array(p) < 0.2) < 0.4


def test_the_feared_fault_is_found_as_often_as_stated():
    rng = np.random.default_rng(2)
    outcome = two_sample(draw(rng), draw(rng))
    assert outcome.same
    shift = outcome.detectable_shift
    assert shift is not None
    assert 0.02 <= shift <= 0.3
    found = [not two_sample(draw(rng), draw(rng, tilt=1.5 * shift)).same for _ in range(12)]
    assert sum(found) >= 10


def test_dependence_between_positions_raises_no_alarm():
    """A context's tokens repeat through the answer: positions are no independent evidence."""
    rng = np.random.default_rng(3)

    def repeats():
        return [np.repeat(rng.integers(0, 5, (N, 1)), LENGTH, axis=1) for _ in range(CONTEXTS)]

    p = [two_sample(repeats(), repeats(), seed=i).p_value for i in range(40)]
    assert np.mean(np.array(p) < 0.1) < 0.25


def test_words_say_the_power():
    rng = np.random.default_rng(4)
    words = two_sample(draw(rng), draw(rng)).words
    assert "150 answers at each of 3 contexts" in words
    assert "nine times in ten" in words
    few = two_sample([c[:3] for c in draw(rng)], [c[:3] for c in draw(rng)])
    assert few.detectable_shift is None
    assert "too few" in few.words


def test_shapes_must_agree():
    rng = np.random.default_rng(5)
    with pytest.raises(ValueError, match="same contexts"):
        two_sample(draw(rng), draw(rng)[1:])
