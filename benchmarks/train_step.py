"""One training step on a GPU: drafthead against speculators 0.9.0 and SpecForge 0.2.0 on the same
batches, in one call.

    python benchmarks/train_step.py --out OUT [--peers DIR] [--ttt 1,3,7] [--shape smollm2] ...
    TRITON_INTERPRET=1 python benchmarks/train_step.py --out OUT --tiny   # minutes on a CPU

Shape `lfm2`: hidden 2048, MLP 8192, 32/8 heads, vocabulary 128,000, draft vocabulary 32,000; a
packed row of 8192 positions in 8 documents, the last 80 % of each supervised. Shape `smollm2`:
hidden 576, MLP 2304, 9/3 heads, vocabularies of 49,152 and 16,000, rows of 2048. All sides take a
whole step: forward, backward, clipping, AdamW. They start from the same weights, so their first
losses must agree.

- drafthead trains the LM head; its steps are replayed as CUDA graphs, as `drafthead train` does it.
  `drafthead-muon` is the same with its default optimizer, `drafthead-launched` without graphs,
  `drafthead-fp8` with `train.matmul: fp8`.
- speculators is as it comes: LM head frozen, its own KL loss (the eager form: the fused one does
  not compile under PyTorch 2.11), torch.compile, autocast bf16, fused AdamW (its trainer's is not
  fused: this favours it).
- SpecForge is as it comes, too: LM head trained, flex attention, the teacher over the whole
  vocabulary, its bf16 optimizer. It does not pack: it gets the 8 documents as 8 rows of a batch,
  which are equally long, so that it pads nothing (this favours it). Its cross-entropies are shown
  less the teacher's entropy, which makes them KL divergences.

Blocks of steps alternate between the sides; a figure is the median over blocks, with the spread.
Peak memory is what a side allocates beyond what the others hold at rest, with all that its graphs
keep reserved.

--peers DIR: where the others lie unpacked (`benchmarks/pack_peers DIR`), if not installed.
Writes OUT/train_step.json after every case.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path

import specforge_side
import speculators_side
import torch

from drafthead.fsio import write_json
from drafthead.head.config import HeadConfig
from drafthead.head.model import Eagle3Head
from drafthead.states import Sample
from drafthead.train.batches import Batch, assemble
from drafthead.train.graphed import GraphedStep
from drafthead.train.graphs import Graphs
from drafthead.train.losses import Teacher
from drafthead.train.operations import matmul_rate, operations
from drafthead.train.optimizer import AdamW, AdamWSettings
from drafthead.train.step import Objective, TrainStep

DOCUMENTS = 8
SUPERVISED = 0.8


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one benchmark."""

    hidden: int = 2048
    mlp: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 128_000
    draft_vocab: int = 32_000
    tokens: int = 8192
    aux: int = 3


SHAPES = {
    "lfm2": Shape(),
    "smollm2": Shape(576, 2304, 9, 3, 64, 49_152, 16_000, 2048),
    "tiny": Shape(64, 128, 4, 2, 16, 512, 128, 256),
}


def documents(shape: Shape, seed: int) -> list[Sample]:
    """Random documents that fill a row exactly, each with a prompt of a fifth of its tokens."""
    g = torch.Generator().manual_seed(seed)
    positions = shape.tokens // DOCUMENTS
    length = positions + 2
    prompt = length - round(SUPERVISED * positions)
    return [
        Sample(
            ids=torch.randint(0, shape.draft_vocab, (length,), generator=g, dtype=torch.int32),
            loss_mask=torch.arange(length) >= prompt,
            states=torch.randn(length - 1, shape.aux + 1, shape.hidden, generator=g).bfloat16(),
            num_aux=shape.aux,
            prompt_len=prompt,
            conversation=str(number),
            split="train",
        )
        for number in range(DOCUMENTS)
    ]


class Ours:
    """drafthead's step."""

    name = "drafthead"
    eight_bit = muon = False
    replayed = True

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like=None):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        config = self.config = HeadConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab,
            draft_vocab_size=shape.draft_vocab,
            target_hidden_size=shape.hidden,
            aux_layer_ids=tuple(range(1, shape.aux + 1)),
            max_position_embeddings=8192,
            rope_theta=5e6,
        )
        with torch.device(device):
            head = Eagle3Head(config).to(dtype)
            embedding = torch.randn(shape.vocab, shape.hidden).mul_(0.02).to(dtype)
        rows, embedding = embedding[: shape.draft_vocab].clone(), embedding.cpu()
        head.lm_head.weight.data.copy_(rows)
        teacher = Teacher(torch.ones(shape.hidden, device=device, dtype=dtype), 1e-5, rows)
        to_draft = torch.arange(shape.vocab)
        to_draft[shape.draft_vocab :] = -1
        self.batches: list[Batch] = []
        for documents in samples:
            batch = assemble(documents, steps, to_draft, shape.tokens, embedding)
            assert batch is not None
            self.batches.append(batch.map(lambda x: x.to(device)))
        objective = Objective("kl", steps, 1.0, chunk_rows=options.chunk)
        self.embedding = embedding
        self.start = {name: t.cpu().clone() for name, t in head.state_dict().items()}
        step = TrainStep(head, teacher, objective, options.compile, self.eight_bit)
        self.graphs = Graphs(device if self.replayed else torch.device("cpu"))
        self.step = GraphedStep(step, shape.tokens, self.graphs) if self.replayed else step
        self.optimizer = AdamW(
            head.named_parameters(), AdamWSettings(self.muon), graphs=self.graphs
        )
        self.operations = operations(config, self.batches[0])

    def reserved(self) -> int:
        """Bytes that the graphs keep to themselves."""
        if self.graphs.pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if s["segment_pool_id"] == self.graphs.pool)

    def run(self, number: int) -> torch.Tensor:
        batch = self.batches[number % len(self.batches)]
        loss, _ = self.step.backward(batch)
        count = torch.full((), len(batch.labels), dtype=torch.float32, device=loss.device)
        self.optimizer.step(1e-4, count)
        return loss / count


class OursFp8(Ours):
    """drafthead's step with `train.matmul: fp8`."""

    name = "drafthead-fp8"
    eight_bit = True


class OursMuon(Ours):
    """drafthead's step with `train.optimizer: muon`, its default."""

    name = "drafthead-muon"
    muon = True


class OursLaunched(Ours):
    """drafthead's step, each kernel started by the host."""

    name = "drafthead-launched"
    replayed = False


class Speculators:
    """speculators 0.9.0's step, as its trainer makes it, from the weights of `Ours`."""

    name = "speculators"

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like: Ours):
        model = speculators_side.make_model(like.config, device)
        ids = torch.arange(shape.draft_vocab)
        norm = torch.ones(shape.hidden)
        speculators_side.give_target(
            model, like.embedding, norm, like.embedding[: shape.draft_vocab], ids
        )
        model.load_state_dict(like.start, strict=False)
        self.side = speculators_side.Side(model, steps, 1e-4, 0.0)
        self.batches = [
            speculators_side.make_batch(documents, shape.tokens, shift=2).map(
                lambda x: x.to(device)
            )
            for documents in samples
        ]

    def run(self, number: int) -> torch.Tensor:
        return self.side.step(self.batches[number % len(self.batches)])


class SpecForge:
    """SpecForge 0.2.0's step, as its trainer makes it, from the weights of `Ours`."""

    name = "specforge"

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like: Ours):
        model = specforge_side.make_model(like.config, steps, device)
        specforge_side.give_weights(model, like.start, like.embedding)
        # No token outside the draft vocabulary may be likeliest: it would not train on such rows.
        target_head = like.embedding.to(device, copy=True)
        target_head[shape.draft_vocab :] = 0
        self.side = specforge_side.Side(model, target_head, 1e-4)
        norm = torch.ones(shape.hidden, dtype=target_head.dtype)
        self.batches = [
            {name: t.to(device) for name, t in specforge_side.make_batch(part, norm, 1e-5).items()}
            for part in samples
        ]
        rows = target_head[: shape.draft_vocab]
        self.entropies = [specforge_side.entropy(batch, rows, steps) for batch in self.batches]

    def run(self, number: int) -> torch.Tensor:
        number %= len(self.batches)
        mask = self.batches[number]["loss_mask"]
        loss = self.side.step(self.batches[number]) * mask.numel()
        return (loss - self.entropies[number]) / mask.sum()


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def measure(sides: list, device, blocks: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each side, by block, the sides in turn.

    A block's first step is not counted: SpecForge has given all cached memory back, also ours.
    """
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for block in range(blocks):
        for side in sides if block % 2 == 0 else sides[::-1]:
            side.run(0)
            synchronize(device)
            start = time.perf_counter()
            for number in range(steps):
                side.run(number)
            synchronize(device)
            seconds[side.name].append((time.perf_counter() - start) / steps)
    return seconds


def case(shape: Shape, ttt: int, device, options, ceiling: float) -> dict:
    """All figures at one number of steps. ceiling: TFLOP/s of a large bf16 product."""
    samples = [documents(shape, seed) for seed in range(2)]
    sides: list = []
    rest: dict[str, int] = {}
    result: dict = {"ttt_steps": ttt}
    for maker in (Ours, OursMuon, OursLaunched, OursFp8, Speculators, SpecForge):
        if maker.name not in options.sides:
            continue
        before, start = allocated(device), time.perf_counter()
        try:
            side = maker(shape, ttt, samples, device, options, *sides[:1])
            losses = [float(side.run(number)) for number in range(options.warmup)]
            synchronize(device)
        except Exception:  # a peer that cannot run costs nobody else's figures
            if maker is Ours:
                raise
            result[maker.name] = {"failed": traceback.format_exc()}
            continue
        rest[side.name] = allocated(device) - before
        sides.append(side)
        result[side.name] = {"start_seconds": time.perf_counter() - start, "losses": losses}
        print(f"ttt {ttt} {side.name}: warm after {time.perf_counter() - start:.0f} s", flush=True)
    for side in sides:
        others = sum(size for name, size in rest.items() if name != side.name)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number in range(2):
            side.run(number)
        synchronize(device)
        peak = allocated(device, peak=True) - others
        if isinstance(side, Ours):
            peak += side.reserved()
        result[side.name]["peak_gib"] = peak / 2**30
    measure(sides, device, 1, options.steps)  # whatever compiles late does it here
    seconds = measure(sides, device, options.blocks, options.steps)
    for side in sides:
        rates = sorted(shape.tokens / s for s in seconds[side.name])
        record = result[side.name]
        record["tokens_per_s"] = statistics.median(rates)
        record["spread"] = [rates[0], rates[-1]]
        record["ms"] = 1e3 * statistics.median(seconds[side.name])
        if isinstance(side, Ours):
            record["operations"] = side.operations
            record["tflops"] = side.operations / record["ms"] / 1e9
            record["mfu"] = record["tflops"] / ceiling
    ours = result[Ours.name]
    for side in sides[1:]:
        theirs = result[side.name]
        theirs["ours_faster"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
        if device.type == "cuda":
            theirs["ours_memory"] = ours["peak_gib"] / theirs["peak_gib"]
    if options.profile:
        for side in sides:
            profile(side, device, options.out / f"profile_{side.name}_ttt{ttt}")
    return result


def profile(side, device, path: Path) -> None:
    """A table of kernels by time, over three steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with record(activities=kinds) as profiler:
        for number in range(3):
            side.run(number)
        synchronize(device)
    order = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    path.with_suffix(".txt").write_text(table)


def check(device) -> dict:
    """Kernels against plain twins on this device; raises where they part."""
    import pytest

    files = [f"tests/train/test_{name}.py" for name in ("kernels", "gpu", "fp8")]
    code = pytest.main(["-q", "-x", *files])
    assert code == 0, "kernels and their plain twins differ"
    return {"kernels_checked": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ttt", default="1,3,7")
    parser.add_argument("--peers", type=Path, help="folder with the others, if not installed")
    parser.add_argument(
        "--sides", default="drafthead,drafthead-muon,drafthead-launched,speculators,specforge"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--chunk", type=int, default=Objective.chunk_rows, help="rows of logits at once"
    )
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check", action="store_true", help="kernel tests first")
    parser.add_argument("--shape", choices=list(SHAPES), default="lfm2")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for any machine")
    options = parser.parse_args()
    shape = SHAPES["tiny" if options.tiny else options.shape]
    options.sides = options.sides.split(",")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tiny:
        options.blocks, options.steps, options.warmup = 2, 1, 1
    options.compile = options.compile and device.type == "cuda"
    speculators_side.find(options.peers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record: dict = {
        "benchmark": "train_step",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "shape": dataclasses.asdict(shape),
        "operations": operations.__doc__,
        "matmul_ceiling_tflops": matmul_rate(device, dtype) / 1e12,
        "cases": [],
    }
    if options.check:
        record |= check(device)
    for ttt in (int(part) for part in options.ttt.split(",")):
        found = case(shape, ttt, device, options, record["matmul_ceiling_tflops"])
        record["cases"].append(found)
        write_json(options.out / "train_step.json", record)
        print(json.dumps(found, indent=1), flush=True)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
