"""One training step on a GPU: drafthead against speculators 0.9.0 and SpecForge 0.2.0 on the same
batches, in one call.

    python -m benchmarks.train.step --out OUT [--peers DIR] [--ttt 1,3,7] [--shape smollm2] ...
    TRITON_INTERPRET=1 python -m benchmarks.train.step --out OUT --tiny   # minutes on a CPU

Shape `lfm2`: hidden 2048, MLP 8192, 32/8 heads, vocabulary 128,000, draft vocabulary 32,000; a
packed row of 8192 positions in 8 documents, the last 80 % of each supervised. Shape `smollm2`:
hidden 576, MLP 2304, 9/3 heads, vocabularies of 49,152 and 16,000, rows of 2048. All sides take a
whole step: forward, backward, clipping, AdamW. They start from the same weights, so their first
losses must agree.

- drafthead trains the LM head, and replays CUDA graphs where `drafthead train` does.
  `drafthead-muon` is the same with its default optimizer, `drafthead-launched` without graphs.
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

--peers DIR: where the others lie unpacked (`benchmarks/peers/pack DIR`), if not installed.
Writes OUT/train_step.json after every case.
"""

import argparse
import dataclasses
import json
import statistics
import time
import traceback
from pathlib import Path

import torch

from benchmarks.lib.dspark_sides import DSPARK_SIDES
from benchmarks.lib.record import begin, pick, save
from benchmarks.lib.train_sides import SHAPES, SIDES, Ours, Shape, documents
from benchmarks.peers import speculators_side
from drafthead.drafters.eagle3.operations import operations
from drafthead.drafters.eagle3.step import Objective
from drafthead.ops.ceiling import matmul_rate


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


def case(shape: Shape, ttt: int, device, options, makers=SIDES) -> dict:
    """All figures at one number of steps; with DSpark's sides as `makers`, of layers."""
    samples = [documents(shape, seed) for seed in range(2)]
    sides: list = []
    rest: dict[str, int] = {}
    result: dict = {"ttt_steps": ttt} if makers is SIDES else {"dspark_layers": ttt}
    at_rest = allocated(device)  # what an earlier case has left behind
    for maker in makers:
        if maker.name not in options.sides:
            continue
        before, start = allocated(device), time.perf_counter()
        try:
            side = maker(shape, ttt, samples, device, options, *sides[:1])
            losses = [float(side.run(number)) for number in range(options.warmup)]
            synchronize(device)
        except Exception:  # a peer that cannot run costs nobody else's figures
            if maker is makers[0]:
                raise
            result[maker.name] = {"failed": traceback.format_exc()}
            continue
        rest[side.name] = allocated(device) - before
        sides.append(side)
        result[side.name] = {"start_seconds": time.perf_counter() - start, "losses": losses}
        print(f"ttt {ttt} {side.name}: warm after {time.perf_counter() - start:.0f} s", flush=True)
    for side in sides:
        others = at_rest + sum(size for name, size in rest.items() if name != side.name)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number in range(2):
            side.run(number)
        synchronize(device)
        peak = allocated(device, peak=True) - others
        if hasattr(side, "reserved"):
            peak += side.reserved()
        result[side.name]["peak_gib"] = peak / 2**30
    measure(sides, device, 1, options.steps)  # whatever compiles late does it here
    seconds = measure(sides, device, options.blocks, options.steps)
    for side in sides:
        positions = getattr(sides[0], "positions", shape.tokens)
        rates = sorted(positions / s for s in seconds[side.name])
        record = result[side.name]
        record["tokens_per_s"] = statistics.median(rates)
        record["spread"] = [rates[0], rates[-1]]
        record["ms"] = 1e3 * statistics.median(seconds[side.name])
        if hasattr(side, "operations"):
            record["operations"] = side.operations
            record["tflops"] = side.operations / record["ms"] / 1e9
            record["mfu"] = 1e12 * record["tflops"] / options.ceiling
    ours = result[makers[0].name]
    for side in sides[1:]:
        theirs = result[side.name]
        theirs["ours_faster"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
        if device.type == "cuda":
            theirs["ours_memory"] = ours["peak_gib"] / theirs["peak_gib"]
    return result


def summary(cases: list[dict]) -> dict:
    """Each side's figures by the case and its number of steps or layers."""
    names = ("tokens_per_s", "spread", "peak_gib", "mfu", "ours_faster", "ours_memory")
    return {
        f"{kind}_{number}": {name: pick(side, *names) for name, side in sides.items()}
        for (kind, number), *rest in (found.items() for found in cases)
        for sides in [dict(rest)]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ttt", default="1,3,7")
    parser.add_argument("--dspark", default="", help="layers of DSpark heads to time: 3,5")
    parser.add_argument("--anchors", type=int, default=512, help="DSpark's blocks in a row")
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
    parser.add_argument("--shape", choices=list(SHAPES), default="lfm2")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for any machine")
    options = parser.parse_args()
    shape = SHAPES["tiny" if options.tiny else options.shape]
    options.sides = options.sides.split(",")
    names = [side.name for side in SIDES]
    if not {Ours.name} <= set(options.sides) <= set(names):
        parser.error(f"--sides: {names[0]}, which the rest is compared with, and any of {names}")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tiny:
        options.blocks, options.steps, options.warmup = 2, 1, 1
    options.compile = options.compile and device.type == "cuda"
    speculators_side.find(options.peers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options.ceiling = matmul_rate(device, dtype)  # operations per second of a large product
    record: dict = {
        **begin("train_step"),
        "shape": dataclasses.asdict(shape),
        "operations": operations.__doc__,
        "matmul_ceiling_tflops": options.ceiling / 1e12,
        "cases": [],
    }
    numbers = lambda text: [int(part) for part in text.split(",") if part]
    wide = dataclasses.replace(shape, aux=5)
    cases = [(shape, ttt, SIDES) for ttt in numbers(options.ttt)]
    cases += [(wide, layers, DSPARK_SIDES) for layers in numbers(options.dspark)]
    for of, number, makers in cases:
        found = case(of, number, device, options, makers)
        record["cases"].append(found)
        save(options.out / "train_step.json", record, summary(record["cases"]))
        print(json.dumps(found, indent=1), flush=True)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
