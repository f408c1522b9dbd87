"""AdamW with split masters against PyTorch's own on fp32 weights."""

import pytest
import torch

from drafthead.train import muon
from drafthead.train.optimizer import AdamW, AdamWSettings
from drafthead.train.split_fp32 import join, split


def test_split_joins_back_to_the_same_bits_and_rounds_to_nearest():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    master = bits.view(torch.float32)
    master = master[master.isfinite() & (master.abs() < 3e38)]
    high, low = split(master)
    assert torch.equal(join(high, low).view(torch.int32), master.view(torch.int32))
    error = (high.float() - master).abs()
    assert (error <= (master.bfloat16().float() - master).abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_torch_adamw(dtype):
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(5)]
    ours = [torch.nn.Parameter(t.clone().to(dtype)) for t in start]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = AdamW(
        [("matrix", ours[0]), ("vector", ours[1])],
        AdamWSettings(weight_decay=0.1, max_grad_norm=1.0),
    )
    for name, t in zip(("matrix", "vector"), start):
        optimizer.load_master(name, t)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[0]], "weight_decay": 0.1},
            {"params": [theirs[1]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    count = torch.tensor(4.0)
    for step in range(20):
        rate = 1e-2 / (step + 1)
        gradients = [torch.randn(t.shape).to(dtype) for t in start]
        for p, q, g in zip(ours, theirs, gradients):
            p.grad, q.grad = g.clone(), g.float() / 4
        norm = optimizer.step(rate, count)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(norm, expected)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for name, q in zip(("matrix", "vector"), theirs):
        torch.testing.assert_close(optimizer.masters()[name], q.data, rtol=1e-5, atol=1e-6)
        assert (
            torch.equal(
                optimizer.parameters[name].data, split(optimizer.masters()[name])[0].to(dtype)
            )
            or dtype == torch.float32
        )


def test_a_gradient_that_is_not_finite_changes_nothing_and_shows_in_the_norm():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdamW([("p", p)], AdamWSettings())
    p.grad = torch.tensor([1.0, float("nan"), 1.0], dtype=torch.bfloat16)
    norm = optimizer.step(0.1, torch.tensor(1.0))
    assert not norm.isfinite()
    assert torch.equal(p.data, torch.ones_like(p))
    assert not optimizer.mean["p"].any()
    assert not optimizer.square["p"].any()


def test_state_survives_a_change_of_dtype():
    torch.manual_seed(0)
    master = torch.randn(4, 3)
    first = AdamW([("p", torch.nn.Parameter(master.bfloat16()))], AdamWSettings())
    first.load_master("p", master)
    first.parameters["p"].grad = torch.randn(4, 3).bfloat16()
    first.step(0.1, torch.tensor(1.0))
    second = AdamW([("p", torch.nn.Parameter(torch.zeros(4, 3)))], AdamWSettings())
    second.load_state_dict(first.state_dict(), steps=1)
    assert torch.equal(second.masters()["p"], first.masters()["p"])
    assert torch.equal(second.mean["p"], first.mean["p"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_follows_torch_muon(dtype):
    torch.manual_seed(0)
    names = "fc", "q_proj", "up_proj", "gate_proj"
    start = torch.randn(12, 5), torch.randn(6, 9), torch.randn(7, 4), torch.randn(7, 4)
    ours = [torch.nn.Parameter(t.clone().to(dtype)) for t in start]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    settings = AdamWSettings(muon=True, weight_decay=0.1, max_grad_norm=1e9)
    optimizer = AdamW(zip(names, ours), settings)
    for name, t in zip(names, start):
        optimizer.load_master(name, t)
    assert not optimizer.square
    assert [len(stack.parameters) for stack in optimizer.muon.stacks] == [1, 1, 2]
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        for p, q in zip(ours, theirs):
            gradient = torch.randn(p.shape).to(dtype)
            p.grad, q.grad = gradient.clone(), gradient.float()
        optimizer.step(1e-2, torch.tensor(1.0))
        reference.step()
    for name, t, q in zip(names, start, theirs):  # PyTorch's iterates in bf16, ours here in fp32
        error = optimizer.masters()[name] - q.data
        assert error.norm() < 0.03 * (q.data - t).norm()
    other = AdamW(
        [(n, torch.nn.Parameter(torch.zeros_like(p))) for n, p in zip(names, ours)], settings
    )
    other.load_state_dict(optimizer.state_dict(), steps=10)
    for name in names:
        assert torch.equal(other.masters()[name], optimizer.masters()[name])
        assert torch.equal(other.mean[name], optimizer.mean[name])
        assert other.mean[name].any()


@pytest.mark.parametrize("falling", [0, 1, 2], ids=["flat", "1/i", "1/i^2"])
def test_newton_schulz_by_gram_is_newton_schulz(falling):
    """Singular values near each other, and so far apart that fp16 loses the small ones."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(2, n, 96)).Q for n in (96, 300))
    wide = left * torch.arange(1, 97) ** -float(falling) @ right.mT
    wide /= torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True)
    expected = muon.newton_schulz(wide.double())
    assert torch.linalg.svdvals(expected).max() < 1.3
    for rule in (muon.newton_schulz, muon.by_gram):
        for dtype, close in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
            error = rule(wide.to(dtype)).double() - expected
            assert error.norm() < close * expected.norm()


def test_muon_leaves_the_lm_head_and_vectors_to_adamw_and_survives_a_nan():
    named = {"lm_head.weight": torch.ones(4, 3), "norm.weight": torch.ones(3), "fc": torch.eye(3)}
    parameters = {n: torch.nn.Parameter(t) for n, t in named.items()}
    optimizer = AdamW(parameters.items(), AdamWSettings(muon=True))
    assert optimizer.square.keys() == {"lm_head.weight", "norm.weight"}
    for p in parameters.values():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(0.1, torch.tensor(1.0))
    for name, p in parameters.items():
        assert torch.equal(p.data, named[name])
        assert not optimizer.mean[name].any()


@pytest.mark.parametrize("muon", [False, True])
def test_the_lm_head_has_a_rate_of_its_own(muon):
    torch.manual_seed(0)
    moved = {}
    for share in (1.0, 0.25, 0.0):
        named = {n: torch.nn.Parameter(torch.zeros(6, 4)) for n in ("fc.weight", "lm_head.weight")}
        optimizer = AdamW(named.items(), AdamWSettings(muon, lm_head_rate=share))
        torch.manual_seed(1)
        for p in named.values():
            p.grad = torch.randn(6, 4)
        optimizer.step(1e-2, torch.tensor(1.0))
        moved[share] = [p.detach() for p in named.values()]
    for share in (0.25, 0.0):
        assert torch.equal(moved[share][0], moved[1.0][0])
        torch.testing.assert_close(moved[share][1], share * moved[1.0][1])
    assert moved[1.0][1].all()


@pytest.mark.parametrize("muon", [False, True])
def test_a_step_in_which_no_process_had_a_row_moves_nothing_and_counts(muon):
    """Processes that share gradients bring zeros for rows without a supervised token; alone there
    are no gradients at all. Both leave what the step before left, momentum included."""
    left = []
    for shared in (False, True):
        p = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = AdamW([("fc.weight", p)], AdamWSettings(muon))
        p.grad = torch.full((4, 3), 2.0)
        optimizer.step(0.1, torch.tensor(5.0))
        before = p.detach().clone(), optimizer.mean["fc.weight"].clone()
        p.grad = torch.zeros(4, 3) if shared else None
        assert optimizer.step(0.1, torch.tensor(0.0)) == 0
        assert torch.equal(p, before[0])
        assert torch.equal(optimizer.mean["fc.weight"], before[1])
        assert p.grad is None
        left.append(optimizer.steps)
    assert left == [2, 2]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_matrix_is_divided_and_rounded_at_once_to_the_same_bits(kind):
    torch.manual_seed(0)
    stack = torch.randn(2, 33, 20).to(kind)
    stack[0, 0, 0] = 300.0
    for x in (stack, stack.mT):
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        for dtype in (torch.float32, torch.float16):
            found = muon.scaled(x, dtype)
            assert torch.equal(found, (x / norm).to(dtype))
            assert found.stride() == x.stride()
    assert not muon.scaled(torch.zeros_like(stack), torch.float16).any()
