"""One training step on a GPU: drafthead against speculators 0.9.0 on the same batches, in one call.

    python benchmarks/train_step.py --out OUT [--peers DIR] [--ttt 1,3,7] [--profile] [--check]
    python benchmarks/train_step.py --out OUT --tiny          # a minute on two CPU cores

Shape: hidden 2048, MLP 8192, 32/8 heads, vocabulary 128,000, draft vocabulary 32,000; a packed row
of 8192 positions in 8 documents, the last 80 % of each supervised. Ours trains the LM head; theirs
is as it comes: LM head frozen, its own KL loss (the eager form: the fused one does not compile
under PyTorch 2.11), torch.compile, autocast bf16, fused AdamW (its trainer's is not fused: this
favours it). Both take a whole step: forward, backward, clipping, AdamW. They start from the same
weights, so their first losses must agree. Blocks of steps alternate between the two; a figure is
the median over blocks, with the spread. Peak memory is what a side allocates beyond what the other
one holds at rest.

--peers DIR: where speculators lies unpacked (`benchmarks/pack_peers DIR`), if not installed.
Writes OUT/train_step.json after every case.
"""

import argparse
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import json
import platform
import statistics
import sys
import time
import types
from pathlib import Path

import torch

from drafthead.fsio import write_json
from drafthead.head.config import HeadConfig
from drafthead.head.model import Eagle3Head
from drafthead.states import Sample
from drafthead.train.batches import Batch, assemble
from drafthead.train.losses import Teacher
from drafthead.train.operations import matmul_rate, operations
from drafthead.train.optimizer import AdamW, AdamWSettings
from drafthead.train.step import Objective, TrainStep

# What speculators imports at start but does not call in a training step.
NOT_CALLED = ("openai", "datasets", "hs_connectors", "aiohttp", "httpx", "loguru")
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


TINY = Shape(64, 128, 4, 2, 16, 512, 128, 256)


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

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like=None):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        config = HeadConfig(
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
        rows = embedding[: shape.draft_vocab].clone()
        head.lm_head.weight.data.copy_(rows)
        teacher = Teacher(torch.ones(shape.hidden, device=device, dtype=dtype), 1e-5, rows)
        to_draft = torch.arange(shape.vocab)
        to_draft[shape.draft_vocab :] = -1
        self.batches: list[Batch] = []
        for documents in samples:
            batch = assemble(documents, steps, to_draft, shape.tokens)
            assert batch is not None
            self.batches.append(batch.map(lambda x: x.to(device)))
        objective = Objective("kl", steps, 1.0, chunk_rows=options.chunk)
        self.embedding = embedding
        self.start = {name: t.cpu().clone() for name, t in head.state_dict().items()}
        self.step = TrainStep(head, embedding, teacher, objective, compiled=options.compile)
        self.optimizer = AdamW(head.named_parameters(), AdamWSettings())
        self.operations = operations(config, self.batches[0])

    def run(self, number: int) -> torch.Tensor:
        batch = self.batches[number % len(self.batches)]
        loss, _ = self.step.backward(batch)
        count = torch.full((), len(batch.labels), dtype=torch.float32, device=loss.device)
        self.optimizer.step(1e-4, count)
        return loss / count


class Speculators:
    """speculators 0.9.0's step, as its trainer makes it."""

    name = "speculators"

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like: Ours):
        from speculators.losses.utils import resolve_loss_config
        from speculators.models.eagle3 import Eagle3SpeculatorConfig
        from speculators.models.eagle3.core import Eagle3DraftModel
        from transformers import LlamaConfig

        torch.manual_seed(0)
        layer = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=1,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        )
        if device.type != "cuda":  # flex attention without torch.compile would be all mask
            layer._attn_implementation = "eager"
        config = Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=shape.draft_vocab,
            eagle_aux_hidden_state_layer_ids=list(range(1, shape.aux + 1)),
        )
        with torch.device(device):
            model = Eagle3DraftModel(config)
        with torch.no_grad():
            # The same weights as ours: the first losses must agree.
            model.load_state_dict(like.start, strict=False)
            model.embed_tokens.weight.copy_(like.embedding)
            model.verifier_norm.weight.fill_(1.0)
            model.verifier_lm_head.weight.copy_(like.embedding[: shape.draft_vocab])
        self.model, self.steps = model.train(), steps
        self.loss = resolve_loss_config("kl_div", implementation="eager")
        self.batches = [self._batch(documents, device) for documents in samples]
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
        self.trained, self.device = trained, device

    def _batch(self, documents: list[Sample], device) -> dict:
        """The rows of `Ours` as speculators lays them out: token and verifier state i+1 at i."""
        n = len(documents[0].ids) - 2
        stack = lambda parts: torch.cat(parts)[None].to(device)
        return {
            "hidden_states": stack([d.aux[:n].flatten(1) for d in documents]),
            "verifier_last_hidden_states": stack([d.last[1 : n + 1] for d in documents]),
            "input_ids": stack([d.ids[1 : n + 1].long() for d in documents]),
            "loss_mask": stack([d.loss_mask[2 : n + 2] for d in documents]),
            "position_ids": stack([torch.arange(1, n + 1)] * len(documents)),
            "document_ids": stack([torch.full((n,), i) for i in range(len(documents))]),
        }

    def run(self, number: int) -> torch.Tensor:
        batch = self.batches[number % len(self.batches)]
        with torch.autocast(self.device.type, torch.bfloat16):
            _, loss, _ = self.model(
                **batch, ttt_steps=self.steps, ttt_step_loss_decay=1.0, loss_config=self.loss
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()


def find_peers(folder: Path | None) -> None:
    """Make speculators importable from `folder`, what it never calls from nothing."""
    if folder:
        sys.path.insert(0, str(folder))
    missing = [name for name in NOT_CALLED if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Nothings(missing))


class _Nothings(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of the given names whose every member is an empty class."""

    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def member(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__dict__["__getattr__"] = member


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def measure(sides: list, device, blocks: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each side, by block, the sides in turn."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for block in range(blocks):
        for side in sides if block % 2 == 0 else sides[::-1]:
            synchronize(device)
            start = time.perf_counter()
            for number in range(steps):
                side.run(number)
            synchronize(device)
            seconds[side.name].append((time.perf_counter() - start) / steps)
    return seconds


def case(shape: Shape, ttt: int, device, options, out: Path) -> dict:
    """All figures at one number of steps."""
    samples = [documents(shape, seed) for seed in range(2)]
    makers = [Ours, *([] if options.only_ours else [Speculators])]
    sides, rest, result = [], {}, {"ttt_steps": ttt}
    for maker in makers:
        before, start = allocated(device), time.perf_counter()
        side = maker(shape, ttt, samples, device, options, *sides)
        losses = [float(side.run(number)) for number in range(options.warmup)]
        synchronize(device)
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
        result[side.name]["peak_gib"] = (allocated(device, peak=True) - others) / 2**30
    seconds = measure(sides, device, options.blocks, options.steps)
    for side in sides:
        rates = sorted(shape.tokens / s for s in seconds[side.name])
        record = result[side.name]
        record["tokens_per_s"] = statistics.median(rates)
        record["spread"] = [rates[0], rates[-1]]
        record["ms"] = 1e3 * statistics.median(seconds[side.name])
    ours = result[Ours.name]
    ours["operations"] = sides[0].operations
    ours["tflops"] = sides[0].operations / ours["ms"] / 1e9
    if len(sides) == 2:
        theirs = result[Speculators.name]
        result["speed_ratio"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
        if device.type == "cuda":
            result["memory_ratio"] = ours["peak_gib"] / theirs["peak_gib"]
    if options.profile:
        for side in sides:
            profile(side, device, out / f"profile_{side.name}_ttt{ttt}")
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

    code = pytest.main(["-q", "-x", "tests/train/test_kernels.py", "tests/train/test_gpu.py"])
    assert code == 0, "kernels and their plain twins differ"
    return {"kernels_checked": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ttt", default="1,3,7")
    parser.add_argument("--peers", type=Path, help="folder with speculators, if not installed")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--chunk", type=int, default=4096, help="rows of logits at once")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check", action="store_true", help="kernel tests first")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for any machine")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tiny:
        options.blocks, options.steps, options.warmup = 2, 2, 1
    options.compile = options.compile and device.type == "cuda"
    find_peers(options.peers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record: dict = {
        "benchmark": "train_step",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "shape": dataclasses.asdict(TINY if options.tiny else Shape()),
        "operations": operations.__doc__,
        "matmul_ceiling_tflops": matmul_rate(device, dtype) / 1e12,
        "cases": [],
    }
    if options.check:
        record |= check(device)
    for ttt in (int(part) for part in options.ttt.split(",")):
        found = case(TINY if options.tiny else Shape(), ttt, device, options, options.out)
        found["drafthead"]["mfu"] = found["drafthead"]["tflops"] / record["matmul_ceiling_tflops"]
        record["cases"].append(found)
        write_json(options.out / "train_step.json", record)
        print(json.dumps(found, indent=1), flush=True)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
