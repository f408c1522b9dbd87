"""What only a GPU can show: flash attention, kernels and compiled pieces against the plain step."""

import io
import json
import time

import pytest
import torch
from rich.console import Console

from drafthead.drafters.eagle3 import graphed
from drafthead.drafters.eagle3.graphed import GraphedStep
from drafthead.drafters.eagle3.packing import pack_row
from drafthead.drafters.eagle3.step import Objective, TrainStep
from drafthead.ops.attention import Documents, attention
from drafthead.ops.graphs import Graphs
from drafthead.ops.losses import Teacher
from drafthead.ops.vocabulary import draft_ids
from drafthead.train import loop
from drafthead.train.meter import Meter
from drafthead.train.optimizer import AdamW, AdamWSettings
from drafthead.train.parallel import World
from tests.heads import small_head
from tests.reference.plain_attention import plain_attention
from tests.train.samples import sample
from tests.train.toy import make_task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("diagonals", [0, 1, 6])
@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize(
    ("heads", "groups", "d"), [(32, 8, 64), (9, 3, 64), (4, 4, 64), (8, 8, 96)]
)
def test_flash_attention_with_diagonals(diagonals, window, heads, groups, d):
    torch.manual_seed(0)
    documents = Documents.of([300, 17, 64], [411, 17, 200], "cuda")
    n, keys = 381, 628
    shapes = [(n, heads, d), (keys, groups, d), (keys, groups, d)]
    shapes += [(diagonals, n, groups, d)] * 2
    tensors = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    used = 5 if diagonals else 3
    fast = tensors if diagonals else [*tensors[:3], None, None]
    found = attention(*fast, documents, window)
    expected = plain_attention(*exact, documents, window)
    assert relative(found, expected) < 6e-3
    direction = torch.randn_like(found)
    ours = torch.autograd.grad((found * direction).sum(), tensors[:used])
    theirs = torch.autograd.grad((expected * direction.double()).sum(), exact[:used])
    for a, b in zip(ours, theirs):
        assert relative(a, b) < 1e-2


@pytest.mark.parametrize("loss", ["kl", "ce+smoothl1", "acceptance"])
@pytest.mark.parametrize("compiled", [False, True])
def test_step_on_the_gpu_is_the_plain_step(loss, compiled):
    changes = {"hidden_size": 128, "target_hidden_size": 128, "head_dim": 32, "vocab_size": 512}
    head = small_head(**changes, draft_vocab_size=256, intermediate_size=256)
    with torch.no_grad():
        for name, p in head.named_parameters():
            if "norm" not in name:
                p.mul_(0.3)
            p.copy_(p.bfloat16())
    g = torch.Generator().manual_seed(0)
    embedding = torch.randn(512, 128, generator=g).bfloat16()
    to_draft = draft_ids(head.target_ids(), 512)
    samples = [sample(n, n // 3, str(n), n) for n in (150, 40, 77)]
    for s in samples:
        object.__setattr__(s, "states", torch.randn(len(s.ids), 4, 128, generator=g).bfloat16())
        object.__setattr__(s, "num_aux", 3)
    batch = pack_row(samples, 3, to_draft, 1000, embedding).batch("cpu")
    weights = torch.ones(128), 1e-5, torch.randn(256, 128, generator=g).bfloat16()
    objective = Objective(loss, 3, 0.8, chunk_rows=100)

    plain = TrainStep(
        head.double(),
        Teacher(weights[0].double(), weights[1], weights[2].double()),
        objective,
    )
    wide = batch.map(lambda x: x.double() if x.is_floating_point() else x)
    expected, correct, _ = plain.backward(wide)
    gradients = {n: p.grad for n, p in head.named_parameters()}
    fast = small_head(**changes, draft_vocab_size=256, intermediate_size=256)
    fast.load_state_dict(head.state_dict())
    fast = fast.to("cuda", torch.bfloat16)
    step = TrainStep(
        fast,
        Teacher(weights[0].cuda().bfloat16(), weights[1], weights[2].cuda()),
        objective,
        compiled,
    )
    on_gpu = batch.map(lambda x: x.cuda())
    torch.cuda.set_sync_debug_mode("default" if compiled else "error")
    try:
        found, found_correct, _ = step.backward(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative(found, expected) < 1e-2
    assert (found_correct.cpu() - correct).abs().max() <= 3
    for name, p in fast.named_parameters():
        assert relative(p.grad.cpu(), gradients[name]) < 5e-2, name
    optimizer = AdamW(fast.named_parameters(), AdamWSettings())
    norm = optimizer.step(1e-3, torch.tensor(3.0, device="cuda"))
    assert norm.isfinite()


def test_muon_on_the_gpu_is_muon():
    torch.manual_seed(0)
    start = {n: torch.randn(s) for n, s in (("k", (48, 96)), ("v", (48, 96)), ("up", (192, 96)))}
    gradients = {n: torch.randn(t.shape).bfloat16() for n, t in start.items()}
    settings = AdamWSettings(muon=True)
    masters = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        named = {n: torch.nn.Parameter(t.clone().to(device, dtype)) for n, t in start.items()}
        optimizer = AdamW(named.items(), settings, graphs=Graphs(torch.device(device)))
        for name, t in start.items():
            optimizer.load_master(name, t)
        for rate in (1e-2, 5e-3, 2e-3):
            for name, p in named.items():
                p.grad = gradients[name].to(device, dtype)
            optimizer.step(rate, torch.tensor(1.0, device=device))
        masters.append(optimizer.masters())
    for name, t in start.items():  # there Newton-Schulz is in fp16, of what is in bf16
        assert relative(masters[1][name] - t, masters[0][name] - t) < 0.01


@pytest.mark.parametrize("capture", [0, graphed.CAPTURE], ids=["own sizes", "a full row's size"])
@pytest.mark.parametrize("loss", ["kl", "ce+smoothl1"])
def test_replayed_steps_are_the_steps(loss, capture, monkeypatch):
    """Rows of several sizes, each seen more than twice: called, captured and replayed."""
    monkeypatch.setattr(graphed, "CAPTURE", capture)
    g = torch.Generator().manual_seed(0)
    changes = {"hidden_size": 128, "target_hidden_size": 128, "head_dim": 32, "vocab_size": 512}
    head = small_head(**changes, draft_vocab_size=256, intermediate_size=256)
    head = head.to("cuda", torch.bfloat16)
    embedding = torch.randn(512, 128, generator=g).bfloat16()
    to_draft = draft_ids(head.target_ids().cpu(), 512)
    rows = []
    for lengths in [(150, 40, 77), (300, 20), (290, 20, 3), (9, 8, 140, 30, 31)] * 4:
        samples = [sample(n, n // 3, str(n), n) for n in lengths]
        for s in samples:
            object.__setattr__(s, "states", torch.randn(len(s.ids), 4, 128, generator=g).bfloat16())
            object.__setattr__(s, "num_aux", 3)
        row = pack_row(samples, 3, to_draft, 400, embedding, pinned=True)
        rows.append(row.batch("cuda"))
    norm, rows_of_head = torch.ones(128), torch.randn(256, 128, generator=g)
    teacher = Teacher(norm.cuda().bfloat16(), 1e-5, rows_of_head.cuda().bfloat16())
    step = TrainStep(head, teacher, Objective(loss, 3, 0.8, chunk_rows=100), compiled=True)
    graphs = Graphs(torch.device("cuda"))
    replayed = GraphedStep(step, 400, graphs)
    for row in rows:
        results = []
        for backward in (step.backward, replayed.backward):
            found, correct, _ = (x.clone() for x in backward(row))
            results.append((found, correct, [p.grad.clone() for p in head.parameters()]))
            for p in head.parameters():
                p.grad = None
        (loss_a, correct_a, grads_a), (loss_b, correct_b, grads_b) = results
        assert relative(loss_b, loss_a) < 1e-2
        assert (correct_a - correct_b).abs().max() <= 2
        for a, b in zip(grads_a, grads_b):
            assert relative(b, a) < 3e-2
    assert graphs.captured == (1 if capture else 3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_of_replayed_steps_learns_the_same(optimizer, tmp_path, monkeypatch):
    """Rows of all sizes while threads read the next ones, two to a step, checkpoints in between."""
    world, found = World(0, 1, torch.device("cuda")), {}
    for name in ("replayed", "launched"):
        if name == "launched":
            monkeypatch.setattr(loop, "worth_replaying", lambda *_: False)
        task = make_task(tmp_path / "states", optimizer=optimizer, eval_every=40, epochs=24)
        found[name] = loop.fit(task, tmp_path / name, world, Console(file=io.StringIO()))
    a, b = found["replayed"], found["launched"]
    assert a["steps"] == b["steps"]
    assert a["tokens"] == b["tokens"]
    assert a["graphs"]["captured"] > b["graphs"]["captured"] == 0
    assert a["accepted_length"] > 1.2
    assert abs(a["accepted_length"] - b["accepted_length"]) < 0.15
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in found
    ]
    for replayed, launched in zip(*losses):
        if replayed is not None:
            assert abs(replayed - launched) < 0.1 * launched + 0.05


def test_waiting_that_queued_work_hides_does_not_count():
    meter = Meter(World(0, 1, torch.device("cuda")), 1, 1e12)
    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds
    with meter.waiting():
        time.sleep(0.05)
    meter.read()
    assert meter.waited < 0.01
    with meter.waiting():
        time.sleep(0.05)
    meter.read()
    assert meter.waited > 0.04
