"""The walk counts what a server counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafthead.drafters.base import TargetSide
from drafthead.drafters.eagle3.drafter import Eagle3
from drafthead.head.acceptance import Acceptance
from drafthead.train.evaluate import evaluate, walk
from tests.heads import sample, small_head, states
from tests.reference.plain_drafting import draft_at
from tests.refused import refused

ALL = np.ones(10, dtype=bool)


def test_a_walk_by_hand():
    answer = np.array([1, 2, 3, 4, 5, 6])
    chains = np.array(
        [
            [2, 3],  # after 1: both right, then the target's own 4
            [0, 0],  # never visited: the step above jumped over it
            [0, 0],
            [9, 6],  # after 4: the first is wrong, so the second does not count
            [6, 7],  # after 5: right, then past the end
        ]
    )
    counts = walk(chains, answer, ALL)
    assert (counts.drafts, counts.draft_tokens) == (3, 6)
    assert counts.accepted == [2, 1]
    assert counts.known == [3, 1]
    assert counts.past_end == [0, 1]
    beyond = walk(np.array([[2, 3, 4]]), answer[:2], ALL)
    assert (beyond.accepted, beyond.past_end) == ([1, 0, 0], [0, 1, 1])
    assert counts.accepted_length == 2.0
    assert counts.by_position == pytest.approx([2 / 3, 1 / 3])
    assert counts.conditional == pytest.approx([2 / 3, 1.0])


def test_tokens_outside_the_draft_vocabulary_are_misses():
    drafted = np.array([True, True, False])
    counts = walk(np.array([[1], [0]]), np.array([0, 2, 1]), drafted)
    assert counts.accepted == [0]
    assert counts.outside == [1]


def test_an_answer_of_one_token_takes_no_step():
    assert walk(np.zeros((0, 3)), np.array([5]), ALL).drafts == 0


@given(st.data())
def test_every_token_is_settled_once(data):
    """Each step settles its accepted drafts and one token more, up to the end of the answer."""
    n, k = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 5))
    tokens = st.integers(0, 2)
    answer = np.array(data.draw(st.lists(tokens, min_size=n, max_size=n)))
    rows = st.lists(st.lists(tokens, min_size=k, max_size=k), min_size=n - 1, max_size=n - 1)
    counts = walk(np.array(data.draw(rows)), answer, np.ones(3, dtype=bool))
    settled = counts.drafts + sum(counts.accepted)
    overshoot = settled - (n - 1)  # the last step's own token may lie past the end
    assert overshoot in (0, 1)
    assert overshoot == counts.past_end[-1] or counts.accepted[-1] > 0
    assert counts.known[0] == counts.drafts, "position 1 never reaches past the end"
    reached = np.array(counts.known[1:]) + np.diff(counts.past_end)
    assert reached.tolist() == counts.accepted[:-1]
    assert all(a <= b for a, b in zip(counts.accepted, counts.known))


def serve(head, embedding, held, k) -> Acceptance:
    """Decode step by step, drafting with the slow twin."""
    counts, truth = Acceptance.zeros(k), held.ids.tolist()
    settled = held.prompt_len
    while settled < len(truth) - 1:
        counts.drafts += 1
        chain = draft_at(head, embedding, held.aux, held.ids, settled - 1, k).tolist()
        matched = 0
        while matched < k and truth[settled + 1 + matched :][:1] == [chain[matched]]:
            counts.accepted[matched] += 1
            matched += 1
        settled += matched + 1
    return counts


def test_evaluation_equals_serving_step_by_step():
    head = small_head(vocab_size=6, draft_vocab_size=4)
    samples = []
    for seed, (length, prompt) in enumerate([(30, 4), (24, 1), (25, 23), (9, 8)]):
        embedding, aux, ids = states(head, length, seed=seed + 5)
        # Write what the head would draft here and there, so that chains are accepted.
        for i in range(prompt - 1, length - 2):
            if (i * 7 + seed) % 3:
                ids[i + 2] = draft_at(head, embedding, aux, ids, i, 1)[0]
        samples.append(sample(ids, prompt, aux[: length - 1]))
    embedding = states(head, 1)[0]
    one, three = evaluate(Eagle3(), head, TargetSide(embedding), samples, [1, 3])
    for total in (one, three):
        expected = Acceptance.total(serve(head, embedding, held, total.k) for held in samples)
        assert total.drafts == expected.drafts
        assert total.accepted == expected.accepted
    assert three.accepted[2] > 0
    assert sum(three.outside) > 0


def test_missing_states_are_refused():
    head = small_head()
    embedding, aux, ids = states(head, 9)
    with refused("some", "7 positions", 8):
        evaluate(Eagle3(), head, TargetSide(embedding), [sample(ids, 3, aux[:7])], 2)
    with refused(field="heldout"):
        evaluate(Eagle3(), head, TargetSide(embedding), [sample(ids, 8, aux)], 2)
