"""What capture's writing process costs a host, without an engine: CPU time and page faults.

    python -m benchmarks.capture.writer_cost \
        --out OUT [--work DIR] [--shape smollm2] [--encoding fp8]

Hands the process what an engine would: units of 256 sequences of 64 + 256 random tokens, 128 at
once, in runs of a GPU's stage, with random states and a stand-in target of the shape's vocabulary
and width. Each unit is sent while the one before is written. As an engine's states would, they
agree with their tokens nowhere, so that check is made and not enforced.

`cpu_s_per_gb` and `page_faults` are medians over the units after the second: the first two touch
the memory of what later ones use again. Writes OUT/writer_cost.json.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.lib import host_load
from benchmarks.lib.record import begin, save
from drafthead.capture.writer_process import WriterProcess
from drafthead.states import StoreMeta

SHAPES = {"lfm2": (65_536, 2048, (2, 12, 21), 24), "smollm2": (49_152, 576, (2, 15, 27), 30)}
"""Vocabulary, width, auxiliary layers and layers."""
SEQUENCES, AT_ONCE, PROMPT, ANSWER = 256, 128, 64, 256
STAGE = 8192  # rows that a GPU hands over at once


def make_target(folder: Path, vocab: int, width: int, layers: int) -> None:
    """A checkpoint of random LM head and final norm alone."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab}
    config |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 16}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocab, width).bfloat16(),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")


def steps() -> list[np.ndarray]:
    """The notes of a unit's steps, int64 [sequences, 4] each, see `SequenceAssembler.note`."""
    found, row = [], 0
    for first in range(0, SEQUENCES, AT_ONCE):
        keys = np.arange(first, first + AT_ONCE)
        for start, count in [(0, PROMPT), *((PROMPT + i, 1) for i in range(ANSWER - 1))]:
            rows = row + count * np.arange(AT_ONCE)
            one = np.ones(AT_ONCE, np.int64)
            found.append(np.stack([keys, rows, start * one, count * one], axis=1))
            row += AT_ONCE * count
    return found


def send_unit(process: WriterProcess) -> None:
    """A unit's rows, whatever lies in the ring."""
    stage: list[np.ndarray] = []
    for notes in [*steps(), None]:
        staged = sum(int(n[:, 3].sum()) for n in stage)
        if notes is None or staged + int(notes[:, 3].sum()) > STAGE:
            run = process.room(staged)
            if run is None:
                raise RuntimeError(process.trouble())
            process.send_rows(*run, np.concatenate(stage).tobytes(), None)
            stage = []
        stage.append(notes)


def measure(args: argparse.Namespace, work: Path) -> list[dict]:
    """What each unit took."""
    vocab, width, aux, layers = SHAPES[args.shape]
    make_target(work, vocab, width, layers)
    meta = StoreMeta(aux, layers, width, args.encoding, args.units, {})
    process = WriterProcess(2 * STAGE, len(meta.layers), width, args.encoding)
    for start in range(0, process.capacity, 512):
        for tensor in process.rows.tensors:
            rows = tensor[start : start + 512]
            rows.copy_(torch.randn(rows.shape))
    store, root, units = work / "store", process._process.pid, []
    options = {"shard_bytes": 1 << 30, "greedy": True, "strict": False}
    options |= {"trust_remote_code": False, "hf_overrides": None}
    trouble = process.open({"store": str(store)}, asdict(meta), str(work), options)
    rng = np.random.default_rng(0)
    send_unit(process)
    before = host_load.counters(root)
    for unit in range(args.units):
        ids = rng.integers(8, vocab, (SEQUENCES, PROMPT + ANSWER)).tolist()
        about = {"prompt_len": PROMPT, "prompt_mask": [False] * PROMPT, "split": "train"}
        wanted = [{"key": key, "conversation": str(key), **about} for key in range(SEQUENCES)]
        process.send_unit(unit, dict(enumerate(ids)), wanted)
        send_unit(process)  # the next one's
        trouble = trouble or process.flush()
        if trouble:
            raise RuntimeError(trouble)
        units.append(host_load.since(before, root))
        before = host_load.counters(root)
        shards = json.loads((store / f"unit-{unit:06}.json").read_text())["shards"]
        units[-1]["bytes"] = sum(shard["bytes"] for shard in shards)
        for path in store.glob(f"unit-{unit:06}-*"):
            path.unlink()
    process.close()
    return units


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="on the disk to write to")
    parser.add_argument("--shape", choices=SHAPES, default="lfm2")
    parser.add_argument("--encoding", default="bf16")
    parser.add_argument("--units", type=int, default=5)
    args = parser.parse_args()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="writer_cost-", dir=args.work))
    try:
        units = measure(args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    steady = units[2:]
    costs = [1e9 * (unit["user_s"] + unit["system_s"]) / unit["bytes"] for unit in steady]
    found = {
        **begin("writer_cost"),
        "units": units,
    }
    figures = {
        "cpu_s_per_gb": round(statistics.median(costs), 3),
        "page_faults": statistics.median(unit["page_faults"] for unit in steady),
    }
    save(args.out / "writer_cost.json", found, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
