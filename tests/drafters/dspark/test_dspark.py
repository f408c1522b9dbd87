"""DSpark's packed row, its loss and its drafts, each against a definition written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from drafthead.drafters.dspark.drafting import draft_blocks
from drafthead.drafters.dspark.model import rotate
from drafthead.drafters.dspark.packing import pack_blocks
from drafthead.drafters.dspark.training import BlockObjective, BlockStep
from drafthead.errors import DraftheadError
from drafthead.ops.losses import Teacher
from drafthead.ops.vocabulary import draft_ids
from drafthead.states import Sample
from tests.drafters.dspark.heads import MASK, VOCAB, small_head
from tests.reference.plain_loss import row_loss

WIDTH = 16


def sample(length, prompt, seed, name="a", unsupervised=()):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) >= prompt
    mask[list(unsupervised)] = False
    return Sample(
        ids=torch.randint(0, VOCAB - 1, (length,), generator=g, dtype=torch.int32),
        loss_mask=mask,
        states=torch.randn(length - 1, 3, WIDTH, generator=g, dtype=torch.float64),
        num_aux=2,
        prompt_len=prompt,
        conversation=name,
        split="train",
    )


SAMPLES = [sample(12, 4, 0), sample(9, 2, 1, unsupervised=[5]), sample(5, 3, 2)]
EMBEDDING = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9)).double()


def packed(head, share=1.0, samples=SAMPLES, seed=(0,), tokens=100):
    to_draft = draft_ids(head.target_ids(), VOCAB)
    size, causal = head.config.block_size, head.config.causal
    row = pack_blocks(samples, size, share, to_draft, tokens, EMBEDDING, seed, causal)
    return None if row is None else row.batch("cpu")


def by_hand(head, sample, anchor, k):
    """What the LM head reads at the k slots of one block, from dense attention over one document.

    Transcribed from `models/qwen3_dflash.py` of vLLM 0.32, one position at a time.
    """
    c = head.config
    fused = head.hidden_norm(head.fc(sample.states[:anchor, :2].flatten(1)))
    x = EMBEDDING[torch.tensor([int(sample.ids[anchor])] + [MASK] * (k - 1))]
    where = torch.arange(anchor, anchor + k)
    for layer in head.layers:
        own, attention = layer.input_layernorm(x), layer.self_attn
        split = lambda p, y: p(y).unflatten(-1, (-1, c.head_dim))
        turn = lambda y, at: rotate(y, head.rotary(at, y.dtype), True)
        q = turn(attention.q_norm(split(attention.q_proj, own)), where)
        both = torch.cat([fused, own])
        places = torch.cat([torch.arange(anchor), where])
        keys = turn(attention.k_norm(split(attention.k_proj, both)), places)
        values = split(attention.v_proj, both)
        keys, values = (y.repeat_interleave(2, dim=1) for y in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * c.head_dim**-0.5
        if c.causal:
            later = torch.ones(k, k, dtype=torch.bool).triu(1)
            scores[:, :, anchor:] = scores[:, :, anchor:].masked_fill(later, -torch.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        x = x + attention.o_proj(out.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return head.norm(x)


def test_a_row_holds_the_blocks_that_it_should():
    head = small_head(dtype=torch.float64)
    to_draft = draft_ids(head.target_ids(), VOCAB)
    batch = packed(head)
    expected = set()
    for number, s in enumerate(SAMPLES):
        for anchor in range(1, len(s.ids) - 1):
            for step in range(head.config.block_size):
                at = anchor + step
                if at + 1 >= len(s.ids) or not s.loss_mask[at] or not s.loss_mask[at + 1]:
                    break
                if to_draft[int(s.ids[at + 1])] < 0:
                    break
                token = (int(s.ids[at]), int(to_draft[int(s.ids[at + 1])]))
                expected.add((number, anchor, step, *token))
    begins = [0, 11, 19]
    found = set()
    for slot, previous, teacher in zip(batch.slots, batch.previous, batch.teacher_of):
        block, step = divmod(int(slot), head.config.block_size)
        number = begins.index(int(batch.blocks.start[block]))
        anchor = int(batch.anchor_positions[block])
        assert int(batch.blocks.end[block]) == begins[number] + anchor
        torch.testing.assert_close(batch.last[teacher], SAMPLES[number].states[anchor + step, 2])
        label = int(batch.labels[teacher])
        found.add((number, anchor, step, int(previous), label))
        torch.testing.assert_close(
            batch.anchors[block], EMBEDDING[int(SAMPLES[number].ids[anchor])]
        )
    assert found == expected
    assert len(batch.slots) == len(expected)
    assert batch.teacher_ends[-1] == len(batch.slots)
    inverse = batch.slot_of[batch.slots]
    assert torch.equal(inverse, torch.arange(len(batch.slots)))


def test_anchors_follow_from_the_seed_and_are_drawn_anew_for_another():
    head = small_head()
    once, again, other = (
        packed(head, 0.4, seed=s).anchor_positions for s in ((1, 2), (1, 2), (3,))
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len(once) < len(packed(head).anchor_positions)


def test_a_row_without_an_anchor_is_none():
    assert packed(small_head(), samples=[sample(5, 4, 0)]) is None
    assert packed(small_head(), samples=[sample(12, 8, 0)], tokens=6) is None


@pytest.mark.parametrize("causal", [False, True])
def test_states_of_a_row_are_those_of_each_block_alone(causal):
    head = small_head(dtype=torch.float64, causal=causal)
    batch = packed(head, 0.7)
    step = BlockStep(head, None, BlockObjective(), EMBEDDING[MASK])
    states = step.states(batch).unflatten(0, (-1, head.config.block_size))
    for block, (start, anchor) in enumerate(zip(batch.blocks.start, batch.anchor_positions)):
        number = [0, 11, 19].index(int(start))
        expected = by_hand(head, SAMPLES[number], int(anchor), head.config.block_size)
        torch.testing.assert_close(states[block], expected)


def problem(kind, **changes):
    head = small_head(dtype=torch.float64, **changes)
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(head.config.draft_vocab_size, WIDTH, generator=g, dtype=torch.float64)
    teacher = Teacher(torch.rand(WIDTH, generator=g, dtype=torch.float64) + 0.5, 1e-5, weight)
    objective = BlockObjective(kind, decay=3.0, chunk_rows=7)
    return head, teacher, BlockStep(head, teacher, objective, EMBEDDING[MASK])


@pytest.mark.parametrize("kind", ["kl", "ce", "acceptance", "ce+tv"])
def test_loss_and_gradients_are_those_of_the_definition(kind):
    head, teacher, step = problem(kind)
    batch = packed(head)
    loss, correct, counted = step.backward(batch)
    found = {name: p.grad for name, p in head.named_parameters()}
    head.zero_grad()

    states = step.states(batch)[batch.slots]
    markov = head.markov_head.markov_w1(batch.previous)
    logits = head.lm_head(states) + head.markov_head.markov_w2(markov)
    soft = teacher.logits(batch.last)[batch.teacher_of]
    labels = batch.labels[batch.teacher_of]
    at = batch.slots % head.config.block_size
    weights = torch.exp(-at.double() / 3.0)
    expected = (row_loss(logits, soft, labels, kind) * weights).sum()
    if kind != "ce":
        accepted = torch.minimum(soft.softmax(-1), logits.softmax(-1)).sum(-1).detach()
        odds = head.confidence_head(states.detach(), markov.detach())
        expected = expected + F.binary_cross_entropy_with_logits(
            odds, accepted.float(), weights.float(), reduction="sum"
        )
        torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=1e-6)
    expected.backward()
    for name, p in head.named_parameters():
        if "confidence" not in name or kind != "ce":
            torch.testing.assert_close(found[name], p.grad, rtol=1e-6, atol=1e-7, msg=name)
    right = logits.argmax(-1) == labels
    for j in range(head.config.block_size):
        assert correct[j] == right[at == j].sum()
        assert counted[j] == (at == j).sum()


def test_a_frozen_lm_head_gets_no_gradient():
    head, _, step = problem("kl")
    head.lm_head.requires_grad_(False)
    step.backward(packed(head))
    assert head.lm_head.weight.grad is None
    assert head.markov_head.markov_w2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_drafts_are_those_of_one_block_after_the_other(causal, k):
    head = small_head(dtype=torch.float64, causal=causal)
    s = SAMPLES[0]
    rows = torch.tensor([0, 3, 7])
    drafts = draft_blocks(head, EMBEDDING, s.aux, s.ids, k, rows)
    for row, chain in zip(rows.tolist(), drafts):
        states, previous = by_hand(head, s, row + 1, k), int(s.ids[row + 1])
        for j in range(k):
            logits = head.lm_head(states[j]) + head.markov_head(torch.tensor(previous))
            previous = int(head.target_ids()[logits.argmax()])
            assert int(chain[j]) == previous


def test_more_drafts_than_a_block_are_refused():
    head, s = small_head(dtype=torch.float64), SAMPLES[0]
    with pytest.raises(DraftheadError):
        draft_blocks(head, EMBEDDING, s.aux, s.ids, head.config.block_size + 1)


def test_a_head_without_an_lm_head_takes_the_targets():
    own = small_head(dtype=torch.float64, draft_vocab_size=VOCAB)
    shared = small_head(dtype=torch.float64, draft_vocab_size=VOCAB, own_lm_head=False)
    shared.load_state_dict({n: t for n, t in own.state_dict().items() if "lm_head" not in n})
    s = SAMPLES[0]
    expected = draft_blocks(own, EMBEDDING, s.aux, s.ids, 3)
    found = draft_blocks(shared, EMBEDDING, s.aux, s.ids, 3, lm_head=own.lm_head.weight)
    assert torch.equal(found, expected)
