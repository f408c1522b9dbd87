"""What only a GPU can show: the way of the states through stages, streams and memory that is shared
and pinned, and an engine beside training on one GPU."""

import shutil
from dataclasses import fields

import pytest
import torch
from rich.console import Console

from drafthead.capture import stages
from drafthead.capture.online import open_states
from drafthead.capture.recorder import StateRecorder
from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.packing import pack_row
from drafthead.ops.vocabulary import draft_ids
from drafthead.recipe import Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.states.format import encode
from drafthead.targets import recipe_target
from drafthead.train.batches import prefetch
from drafthead.train.plan import Plan
from tests.capture.fake_writer import FakeWriter
from tests.vllm.runs import recipe_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("encoding", ["bf16", "fp8", "fp8-aux"])
def test_rows_reach_the_host_although_each_step_overwrites_the_last(encoding):
    device = torch.device("cuda")
    writer = FakeWriter(2 * 64, 3, 256, encoding)
    recorder = StateRecorder(torch.bfloat16, device, writer)
    assert all(tensor.is_pinned() for tensor in writer.rows.tensors)
    g = torch.Generator().manual_seed(0)
    outputs = [torch.zeros(64, 256, device=device, dtype=torch.bfloat16) for _ in range(3)]
    for unit in range(3):
        expected = torch.randn(40, 64, 3, 256, generator=g).bfloat16()
        for step in range(40):
            n = int(torch.randint(1, 65, (1,), generator=g))
            for layer, output in enumerate(outputs):  # as a replayed CUDA graph does
                output[:n].copy_(expected[step, :n, layer], non_blocking=False)
            recorder.record(outputs, [(unit * 100 + step, 0, n)])
            expected[step, n:] = 0
        recorder.end_unit()
        captured = writer.take()
        for step in range(40):
            n = int((expected[step].float().abs().sum((1, 2)) > 0).sum())
            rows = captured.resolve({unit * 100 + step: [0] * (n + 1)})
            found = captured.take(rows[unit * 100 + step])
            wanted = encode(expected[step, :n], encoding)
            for a, b in zip(found, wanted.values(), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    recorder.close()
    assert not any(tensor.is_pinned() for tensor in writer.rows.tensors)


def batches(recipe: Recipe, run: RunDir, device: torch.device) -> list[Batch]:
    """An epoch of them, as training makes them."""
    reader, target = open_states(recipe, run), recipe_target(recipe)
    to_draft = draft_ids(torch.arange(target.vocab_size), target.vocab_size)
    embedding, tokens = target.embedding(), recipe.train.row_tokens
    try:
        plan = Plan.make(reader, 1, tokens, 1, seed=0)
        reader.expect(index for row in plan.rows for index in row)

        def make(number: int) -> Batch | None:
            samples = [reader[index] for index in plan.rows[number]]
            row = pack_row(samples, 2, to_draft, tokens, embedding, pinned=True)
            return None if row is None else row.batch(device)

        return list(prefetch(make, range(len(plan.rows)), device))
    finally:
        reader.close()


def test_an_engine_on_the_gpu_that_trains_gives_the_batches_of_a_store(llama, tmp_path):
    """The store's states are of decoding, the engine's of prefill: the same up to rounding."""
    engine = {"gpu_memory_utilization": 0.2, "extra": {"enforce_eager": True}}
    stored, online = (
        parse_recipe(
            recipe_for(
                llama,
                tmp_path,
                40,
                20,
                capture={"mode": mode},
                engine=engine,
                train={"row_tokens": 256},
            ),
            "test",
        )
        for mode in ("generate", "online")
    )
    first, second = RunDir(tmp_path / "stored"), RunDir(tmp_path / "online")
    stages.generate(stored, first, console=Console(quiet=True))
    shutil.copytree(first.answers, second.answers)
    device = torch.device("cuda")
    pairs = list(zip(batches(stored, first, device), batches(online, second, device), strict=True))
    assert len(pairs) > 4
    assert not second.states.exists()
    for ours, theirs in pairs:
        assert ours.names == theirs.names
        for field in fields(Batch):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name in ("aux", "last"):
                assert a.is_cuda
                assert ((a - b).norm(dim=-1) / a.norm(dim=-1)).max() < 1e-2
            elif isinstance(a, torch.Tensor):
                assert torch.equal(a, b), field.name
