"""All positions at once draft what the server would, one by one."""

import pytest
import torch

from drafthead.head import drafting
from drafthead.head.drafting import draft_chain, prefix_attention
from tests.heads import small_head, states
from tests.reference.plain_drafting import draft_at
from tests.refused import refused


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_before_residual": True, "norm_output": True},
        {"norm_before_fc": True, "fc_norm": True, "attention_bias": True},
        {"num_hidden_layers": 2, "num_key_value_heads": 1},
        {
            "num_hidden_layers": 2,
            "layer_types": ("full_attention", "sliding_attention"),
            "sliding_window": 32,
        },
    ],
    ids=["plain", "residual_output", "fc_bias", "two_layers", "window"],
)
def test_all_positions_equal_one_by_one(changes):
    head = small_head(**changes)
    n = 19 if head.config.layer_types is None else 60
    embedding, aux, ids = states(head, n)
    fast = draft_chain(head, embedding, aux, ids, 4)
    slow = torch.stack([draft_at(head, embedding, aux, ids, i, 4) for i in range(n - 1)])
    assert fast.tolist() == slow.tolist()
    assert len(fast.unique()) > 5, "a head that always drafts the same would prove nothing"


def test_some_rows_equal_all_rows(head):
    embedding, aux, ids = states(head, 19)
    rows = torch.tensor([3, 4, 11])
    every = draft_chain(head, embedding, aux, ids, 3)
    assert draft_chain(head, embedding, aux, ids, 3, rows).tolist() == every[rows].tolist()


def test_chunks_change_nothing(head, monkeypatch):
    embedding, aux, ids = states(head, 40)
    whole = draft_chain(head, embedding, aux, ids, 3)
    monkeypatch.setattr(drafting, "SCORE_BYTES", 3 * 4 * 4 * 39)
    monkeypatch.setattr(drafting, "LOGIT_BYTES", 5 * 4 * head.config.draft_vocab_size)
    assert draft_chain(head, embedding, aux, ids, 3).tolist() == whole.tolist()


def test_drafts_do_not_look_ahead(head):
    embedding, aux, ids = states(head, 12)
    before = draft_chain(head, embedding, aux, ids, 3)[:6]
    aux[6:] += 1.0
    ids[7:] = 0
    assert draft_chain(head, embedding, aux, ids, 3)[:6].tolist() == before.tolist()


def test_drafts_lie_in_the_draft_vocabulary(head):
    embedding, aux, ids = states(head, 12)
    assert head.t2d[draft_chain(head, embedding, aux, ids, 3)].all()


def test_prefix_attention_is_softmax_over_what_is_seen():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, h, 8, generator=g) for h in (4, 2, 2))
    own_k, own_v = ([torch.randn(2, 2, 8, generator=g)] for _ in range(2))
    rows = torch.tensor([0, 3])
    out = prefix_attention(q[:2], rows, k, v, own_k, own_v)
    for m, row in enumerate(rows.tolist()):
        keys = torch.cat([k[: row + 1], own_k[0][m : m + 1]])
        values = torch.cat([v[: row + 1], own_v[0][m : m + 1]])
        for h in range(4):
            weights = (keys[:, h // 2] @ q[m, h] / 8**0.5).softmax(0)
            torch.testing.assert_close(out[m, h], weights @ values[:, h // 2])


def test_a_window_ends_what_a_head_sees():
    """The first position past the window changes nothing; the last one in it does."""
    window = {"layer_types": ("sliding_attention",), "sliding_window": 32}
    head = small_head(**window)
    embedding, aux, ids = states(head, 60)
    row = torch.tensor([50])

    def change(position):
        """The first decoded state of the chain, changed at one position of the prefix."""
        other = aux.clone()
        other[position] += 10.0
        decoded = []
        normed = head.output
        head.output = lambda x: decoded.append(x) or normed(x)
        try:
            draft_chain(head, embedding, other, ids, 2, row)
        finally:
            del head.output
        return decoded

    same = change(0)
    for step, decoded in enumerate(change(50 - 32)):
        assert torch.equal(decoded, same[step])
    inside = change(50 - 31)
    assert not torch.equal(inside[0], same[0])
    # Its key has left the window of the second draft, but the first draft's state has seen it.
    assert not torch.equal(inside[1], same[1])


def test_rows_without_states_are_refused(head):
    embedding, aux, ids = states(head, 8)
    with refused([7], "0..6"):
        draft_chain(head, embedding, aux, ids, 2, torch.tensor([7]))
