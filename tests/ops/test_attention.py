"""Attention of training-time test against one dense mask, forward and gradients."""

import sys

import pytest
import torch

from drafthead.ops import attention as attention_module
from drafthead.ops.attention import Documents, attention
from tests.reference.plain_attention import plain_attention


def problem(dtype, diagonals, heads=6, groups=2, d=4):
    documents = Documents.of([3, 5, 1], [7, 5, 2])
    n, keys = sum(documents.q_lengths), sum(documents.k_lengths)
    g = torch.Generator().manual_seed(diagonals)
    shapes = [(n, heads, d), (keys, groups, d), (keys, groups, d)]
    shapes += [(diagonals, n, groups, d)] * 2
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    return [t.requires_grad_() for t in tensors], documents


@pytest.mark.parametrize("diagonals", [0, 1, 4])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_is_the_dense_one(diagonals, window, dtype, tolerance):
    tensors, documents = problem(dtype, diagonals)
    expected = plain_attention(*tensors, documents, window)
    fast = tensors if diagonals else [*tensors[:3], None, None]
    found = attention(*fast, documents, window)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    direction = torch.randn_like(expected)
    used = tensors[: 5 if diagonals else 3]
    ours = torch.autograd.grad((found * direction).sum(), used)
    theirs = torch.autograd.grad((expected * direction).sum(), used)
    for a, b in zip(ours, theirs):
        # A lone key has no other to take weight from.
        assert b.abs().max() > 0.01 or (window == 1 and not diagonals)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_head_of_any_width_has_rules_where_there_are_kernels(monkeypatch):
    """Kernels only of powers of two: there is no Triton here to ask them, so they must not be."""
    monkeypatch.setattr(attention_module, "_has_kernels", lambda q: True)
    monkeypatch.setitem(sys.modules, "drafthead.ops.kernels", None)
    rules = attention_module._merge_rules(torch.empty(2, 4, 96))
    assert rules == (attention_module.merge, attention_module.merge_backward)
    with pytest.raises(ImportError):
        attention_module._merge_rules(torch.empty(2, 4, 64))


def test_merging_rounds_bf16_once():
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g).bfloat16()
    out, q, k, v = randn(50, 6, 96), randn(50, 6, 96), randn(3, 50, 2, 96), randn(3, 50, 2, 96)
    lse = torch.randn(6, 50, generator=g)
    merged, total = attention_module.merge(out, lse, q, k, v)
    exact = attention_module.merge(*(t.double() for t in (out, lse, q, k, v)))
    torch.testing.assert_close(total.double(), exact[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.double(), exact[0], rtol=2**-8, atol=1e-6)


def test_gradcheck():
    tensors, documents = problem(torch.float64, 2, heads=2, groups=1, d=2)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, documents), tensors)


def test_a_document_sees_nothing_of_the_next():
    tensors, documents = problem(torch.float64, 2)
    before = attention(*tensors, documents)
    with torch.no_grad():
        tensors[1][7:] += 1.0
        tensors[2][7:] += 1.0
    after = attention(*tensors, documents)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_queries_are_the_last_positions_of_their_document():
    tensors, documents = problem(torch.float64, 1)
    before = attention(*tensors, documents)
    with torch.no_grad():
        tensors[2][5] += 1.0  # key 5 of 7: seen by queries at 5 and 6, not by the one at 4
    after = attention(*tensors, documents)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
