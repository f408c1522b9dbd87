"""Training-time test over packed rows against one position at a time with a key-value cache."""

from dataclasses import replace

import pytest
import torch

from drafthead.drafters.eagle3.packing import pack_row
from drafthead.drafters.eagle3.ttt import TrainingTimeTest, take_rows
from drafthead.head.model import Eagle3Head
from tests.heads import small_head
from tests.train.samples import sample

STEPS = 3


def one_position(head: Eagle3Head, embedding, ids, aux, i: int) -> list[torch.Tensor]:
    """The states that the LM head reads at position i, step by step, as a server makes them."""
    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(layer, q, k, v):
        if layer in cache:
            k, v = torch.cat([cache[layer][0], k]), torch.cat([cache[layer][1], v])
        cache[layer] = k, v
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        if window := head.config.window(layer):
            seen &= seen.triu(len(k) - len(q) - window + 1)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, v)

    ids = ids.long()
    hidden, embeds = head.fuse(aux[: i + 1]), embedding[ids[1 : i + 2]]
    decoded = head.decode(embeds, hidden, torch.arange(i + 1), attention)[-1:]
    states = [head.output(decoded)[0]]
    for t in range(1, STEPS):
        if i + 1 + t >= len(ids):
            break
        embeds = embedding[ids[i + 1 + t : i + 2 + t]]
        decoded = head.decode(embeds, head.feedback(decoded), torch.tensor([i + t]), attention)
        states.append(head.output(decoded)[0])
    return states


def problem(**changes):
    head = small_head(**changes).double()
    c = head.config
    documents = [(9, 4), (14, 3), (6, 1)] if c.layer_types is None else [(9, 4), (40, 33)]
    samples, to_draft = [], torch.arange(c.vocab_size) % c.draft_vocab_size
    for number, (length, prompt_len) in enumerate(documents):
        s = sample(length, prompt_len, str(number), number)
        g = torch.Generator().manual_seed(number)
        states = torch.randn(
            length - 1, c.num_aux_hidden_states + 1, c.target_hidden_size, generator=g
        ).double()
        samples.append(
            replace(s, ids=s.ids % c.vocab_size, states=states, num_aux=len(c.aux_layer_ids))
        )
    embedding = torch.randn(c.vocab_size, c.hidden_size, generator=g).double()
    row = pack_row(samples, STEPS, to_draft, 100, embedding)
    return head, embedding, samples, row.batch("cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_before_residual": True, "norm_output": True},
        {"norm_before_fc": True, "fc_norm": True, "attention_bias": True},
        {"num_hidden_layers": 2, "num_key_value_heads": 1},
        {
            "num_hidden_layers": 2,
            "layer_types": ("sliding_attention", "full_attention"),
            "sliding_window": 32,
        },
    ],
    ids=["plain", "residual_output", "fc_bias", "two_layers", "window"],
)
def test_packed_steps_equal_one_position_at_a_time(changes):
    head, embedding, samples, batch = problem(**changes)
    found = TrainingTimeTest(head, STEPS)(batch)
    expected, m, rows = torch.zeros_like(found), 0, 0
    for s in samples:
        chains = [one_position(head, embedding, s.ids, s.aux, i) for i in range(len(s.aux))]
        for p in s.loss_mask.nonzero()[:, 0].tolist():
            if p < 2:
                continue
            for t in range(STEPS):
                if p - 2 - t >= 0:
                    expected[t, m] = chains[p - 2 - t][t]
                    rows += 1
            m += 1
    assert m == found.shape[1]
    assert rows == batch.has_row.sum()
    torch.testing.assert_close(found[batch.has_row], expected[batch.has_row])

    direction = torch.randn_like(found) * batch.has_row[..., None]
    names = [n for n, _ in head.named_parameters() if not n.startswith("lm_head")]
    parameters = [head.get_parameter(n) for n in names]
    ours = torch.autograd.grad((found * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    for name, a, b in zip(names, ours, theirs):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_take_rows_gradient():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows, inverse = torch.tensor([4, 1]), torch.tensor([-1, 1, -1, -1, 0])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows, inverse), x)
