"""What packing a row costs, and how much of it the thread feels that starts a GPU's kernels.

    python -m benchmarks.train.packing --out OUT [--store DIR]

SmolLM2's shape: three auxiliary layers and the last of 576 in bf16, rows of 2,048 positions, TTT 5;
documents of 120 to 320 tokens, the first 30 to 150 of them a prompt. `plain` packs document by
document (the twin that the suite holds `pack_row` against), `packed` as training does, both with
reading from a store in the page cache and, on a GPU, the way there. Three figures, the sides in
turn, each the median over blocks with the range:

- `cpu_ms`: CPU time of the packing thread for a row;
- `fixed_ms`: the same with states of width 8: what is left when nothing is copied, most of it spent
  holding the interpreter's lock;
- `stolen_ms`: what a row packed by one of two other threads adds to the time of 50,000 small tensor
  operations on the main thread. Only where there are cores for all three.

Writes OUT/packing.json.
"""

import argparse
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from drafthead.drafters.eagle3.packing import pack_row
from drafthead.fsio import write_json
from drafthead.states import Sample, StateReader, StateWriter, StoreMeta
from drafthead.train.batches import pack
from tests.train.plain_packing import plain_row

VOCAB, TOKENS, STEPS, DOCUMENTS = 49_152, 2048, 5, 500
BLOCKS, CALLS = 7, 50_000


def make_store(path: Path, width: int) -> StateReader:
    """A store of random states; one that is there is taken."""
    if not (path / "meta.json").exists():
        g, rng, samples = torch.Generator().manual_seed(0), np.random.default_rng(0), []
        for number in range(DOCUMENTS):
            prompt = int(rng.integers(30, 150))
            length = prompt + int(rng.integers(90, 170))
            samples.append(
                Sample(
                    ids=torch.randint(0, VOCAB, (length,), generator=g, dtype=torch.int32),
                    loss_mask=torch.arange(length) >= prompt,
                    states=torch.randn(length - 1, 4, width, generator=g).bfloat16(),
                    num_aux=3,
                    prompt_len=prompt,
                    conversation=str(number),
                    split="train",
                )
            )
        with StateWriter(path, StoreMeta((1, 2, 3), 30, width, "bf16", 1, {})) as writer:
            writer.submit(0, samples, {})
    return StateReader(path, verify=False)


def sides(reader: StateReader, device: torch.device) -> dict[str, Callable[[int], None]]:
    """A function for each that packs a row of the store, by number."""
    rows = pack(reader.tokens - 2, reader.order(0), TOKENS)
    embedding = torch.randn(VOCAB, reader.meta.hidden_size).bfloat16()
    to_draft, gpu = torch.arange(VOCAB), device.type == "cuda"

    def plain(number: int) -> None:
        samples = [reader[i] for i in rows[number % len(rows)]]
        batch = plain_row(samples, STEPS, to_draft, TOKENS, embedding)
        if gpu:
            batch.map(torch.Tensor.pin_memory).map(lambda x: x.to(device, non_blocking=True))

    def packed(number: int) -> None:
        samples = [reader[i] for i in rows[number % len(rows)]]
        pack_row(samples, STEPS, to_draft, TOKENS, embedding, gpu).batch(device)

    for number in range(len(rows)):  # every page of the store is there
        packed(number)
    return {"plain": plain, "packed": packed}


def cpu_ms(make: Callable[[int], None], rows: int = 50) -> float:
    """CPU milliseconds of this thread for a row."""
    start = time.thread_time()
    for number in range(rows):
        make(number)
    return 1e3 * (time.thread_time() - start) / rows


def calls_seconds(device: torch.device) -> float:
    """Seconds of small operations, started one by one."""
    x, start = torch.zeros(1, device=device), time.perf_counter()
    for _ in range(CALLS):
        x.add_(1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stolen_ms(make: Callable[[int], None], device: torch.device) -> float:
    """Milliseconds that a row packed elsewhere adds to the main thread's operations."""
    alone, made, ending = calls_seconds(device), [0, 0], threading.Event()

    def work(thread: int) -> None:
        while not ending.is_set():
            make(thread + 2 * made[thread])
            made[thread] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(made))]
    for thread in threads:
        thread.start()
    before = sum(made)
    beside = calls_seconds(device)
    rows = sum(made) - before
    ending.set()
    for thread in threads:
        thread.join()
    return 1e3 * (beside - alone) / max(1, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path, help="folder for the made stores (default: OUT)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.store or options.out
    wide = sides(make_store(folder / "states-576", 576), device)
    narrow = sides(make_store(folder / "states-8", 8), device)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in wide}
    for block in range(BLOCKS):
        for name in list(found) if block % 2 == 0 else list(found)[::-1]:
            figures = {"cpu_ms": cpu_ms(wide[name]), "fixed_ms": cpu_ms(narrow[name])}
            if (os.cpu_count() or 1) > 2:
                figures["stolen_ms"] = stolen_ms(wide[name], device)
            for figure, value in figures.items():
                found[name].setdefault(figure, []).append(value)
    record = {
        "benchmark": "packing",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "sides": found,
    }
    write_json(options.out / "packing.json", record)
    for name, figures in found.items():
        for figure, values in figures.items():
            middle = statistics.median(values)
            print(f"{name} {figure}: {middle:.2f} ({min(values):.2f}–{max(values):.2f})")


if __name__ == "__main__":
    main()
