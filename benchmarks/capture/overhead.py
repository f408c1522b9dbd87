"""What capture costs: generate+capture against plain generation, paired, in one call.

    python -m benchmarks.capture.overhead --out OUT \
        --smollm2 DIR [--smollm2-nvfp4 DIR] [--peers DIR]
    python -m benchmarks.capture.overhead --out OUT --tiny \
        --smollm2 DIR  # a rehearsal on two CPU cores

For each target engines live side by side, each a vLLM of its own: plain (vLLM as it comes),
capturing in bf16, capturing in fp8 (not for SmolLM2 in NVFP4, whose states are no other size). The
engine's core runs in the process that asks it (unless --own-process): it starts in half the time.
Blocks of the same prompts alternate between the engines, in units of a recipe's size.

`sustained_ratio` is the steady cost: the units after a block's first, each generated while the one
before is written, against the same units of plain generation. `tail_s` is paid once: the writing of
the last unit. `ratio` is the whole block to its last byte on disk, `ratio_at_units` the same for
longer runs (computed from the two), `generating_ratio` leaves the tail out.

With --apart FOLDER (in memory: /dev/shm/x) every second block is also measured with bf16 states
written there, `bf16-memory`, and with them dropped where the writer would take them,
`bf16-nowhere`: their differences are the cost of the disk and of the writer's work. `host` is the
CPU time of each block, from /proc; `written_s` is the time until each unit was on disk.

All engines get the same bytes for their KV cache; `kv_tokens` is what vLLM says it then holds, and
`device_bytes` what capture takes beside it. `decode_against_prefill` compares the states of
decoding with those of prefilling the same sequences.

With --peers (where `peers/pack` put speculators 0.9.0) its own capture follows for SmolLM2 in bf16
and LFM2.5-8B-A1B, on the sequences that the plain engine wrote. The plain engine's time
to write them counts as its generation (this favours it: its own goes over HTTP, too).

LFM2.5-8B-A1B has its exact shapes in NVFP4 and made-up weights that route (spread_weights.py): its
tokens mean nothing, its speed does. Checks of the states are made and not enforced there.

Writes OUT/capture.json after every block.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import lfm2_shapes
from benchmarks.lib.capture_engine import Engine, kv_tokens
from benchmarks.lib.turns import add_turn, turn
from benchmarks.peers.speculators_capture import Server

KEPT = ("aux", "own_process", "seqs", "chunk", "new_tokens", "kv_bytes")
TOPICS = ("a river", "prime numbers", "bread", "the moon", "a town", "sorting", "rain", "ants")
ASKS = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "List ten facts about {}.",
    "Write a Python program that has to do with {} and explain it.",
)


@dataclass(frozen=True)
class Case:
    """One target. `weights` holds the tensors that checks need, `model` what vLLM loads."""

    name: str
    model: Path
    weights: Path
    aux: tuple[int, ...]
    dummy: bool = False
    formats: tuple[str, ...] = ("bf16", "fp8")
    peer: bool = True


def dummy_lfm2(work: Path, tiny: bool) -> Case:
    """LFM2.5-8B-A1B's configuration, a checkpoint of just its embedding and final norm, and a
    tokenizer of one word a token, which both sides need."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lfm2_shapes.write_models(work / "lfm2", tiny)
    model = work / "lfm2" / ("bf16" if tiny else "nvfp4")
    config = json.loads((model / "config.json").read_text())
    words = {f"t{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t7")
    fast.save_pretrained(model)
    weights = work / "lfm2-weights"
    weights.mkdir(exist_ok=True)
    fast.save_pretrained(weights)
    shutil.copy(model / "config.json", weights)
    dtype = torch.float32 if tiny else torch.bfloat16
    hidden = config["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": torch.zeros(config["vocab_size"], hidden, dtype=dtype),
        "model.embedding_norm.weight": torch.ones(hidden, dtype=dtype),
    }
    save_file(tensors, weights / "model.safetensors")
    aux = (2, 4, 6) if tiny else (2, 12, 21)
    return Case("lfm2.5-8b-a1b-nvfp4", model, weights, aux, dummy=True)


def prompts_of(case: Case, count: int, tiny: bool) -> list[list[int]]:
    """Token ids of `count` prompts: real ones, or random ids where the weights are dummies."""
    if case.dummy:
        rng = random.Random(0)
        top = 500 if tiny else 100_000
        return [[1, *(rng.randrange(8, top) for _ in range(63))] for _ in range(count)]
    from drafthead.data.template import Template
    from drafthead.targets import load_target

    target = load_target(case.weights)
    template = Template(target.tokenizer(), target.eos_token_ids, str(case.weights))
    texts = [
        ask.format(f"{topic} and {other}") for ask in ASKS for topic in TOPICS for other in TOPICS
    ]
    return [
        template.encode([{"role": "user", "content": f"({i}) {texts[i % len(texts)]}"}])[0]
        for i in range(count)
    ]


def spec_of(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """What all engines of a case are told."""
    tiny = args.tiny
    return {
        "case": case.name,
        "model": str(case.model),
        "weights": str(case.weights),
        "aux": case.aux,
        "dummy": case.dummy,
        "tiny": tiny,
        "own_process": args.own_process,
        "seqs": 4 if tiny else args.seqs,
        "chunk": 8 if tiny else args.chunk,
        "new_tokens": 16 if tiny else 256,
        "kv_bytes": (64 << 20) if tiny else (3 << 30),
        "memory": str(args.apart or args.work / "memory"),
        "share": 0.06,  # of the card must be free at the start; the KV cache's size is given
    }


class Running:
    """A case whose engines have been started, all at once: most of a start is waiting."""

    def __init__(self, case: Case, args: argparse.Namespace, port: int):
        self.case, self.args, self.spec = case, args, spec_of(case, args)
        self.record: dict[str, Any] = {"name": case.name, "dummy_weights": case.dummy}
        self.record |= {k: self.spec[k] for k in KEPT}
        self.engines: dict[str, Engine] = {}
        for name in ("plain", *case.formats):
            encoding = "fp32" if args.tiny and name == "bf16" else name
            store = None if name == "plain" else str(args.work / f"{case.name}-{name}")
            own = {"store": store, "encoding": "bf16" if name == "plain" else encoding}
            self.engines[name] = Engine(name, self.spec | own, args.work)
        self.server = None
        if args.peers and case.peer and not args.tiny:
            config = json.loads((case.weights / "config.json").read_text())
            layers = [*case.aux, config["num_hidden_layers"]]
            self.server = Server(self.spec, layers, port, args.work)

    def measure(self, write: Callable[[dict], None]) -> None:
        """Alternate blocks between the engines, then compare, then speculators' side."""
        record, args = self.record, self.args
        try:
            for name, engine in self.engines.items():
                record[name] = engine.read(args.limit)
                record[name] |= {"start_s": round(time.monotonic() - engine.begun, 1)}
                record[name] |= {"kv_tokens": kv_tokens(engine.log), "vllm": engine.said()}
            with turn(args.turn):
                self._measure(write)
        except (RuntimeError, OSError, ValueError) as error:
            record["failed"] = str(error)
        write(record)

    def _measure(self, write: Callable[[dict], None]) -> None:
        record, args, spec = self.record, self.args, self.spec
        prompts = prompts_of(self.case, spec["chunk"] * args.units, args.tiny)
        begun, number, ids = time.monotonic(), 0, []
        record["blocks"] = []
        while number <= args.blocks or time.monotonic() - begun < args.seconds:
            sides = [(name, "disk") for name in self.engines]
            if args.apart and number and (args.tiny or number % 2 == 0):
                sides += [("bf16", "memory"), ("bf16", "nowhere")]
            asked = prompts if number else prompts[: spec["seqs"]]  # the first is a warm-up
            block = {}
            for name, to in sides if number % 2 else sides[::-1]:
                side = name if to == "disk" else f"{name}-{to}"
                block[side] = self.engines[name].ask({to: asked}, args.limit)
            ids = block["plain"].pop("ids")
            number += 1
            if number == 1:
                begun = time.monotonic()
                continue
            record["blocks"].append(block)
            record |= summary(record["blocks"])
            write(record)
        if not self.case.dummy:
            some = prompts[: spec["chunk"]]
            record["decode_against_prefill"] = self.engines["bf16"].ask(
                {"compare": some}, args.limit
            )
            write(record)
        if self.server:
            theirs = self.server.capture(ids, args.peers, args.limit)
            if "capture_s" in theirs:
                theirs["generation_s"] = plain = seconds(record["blocks"], "plain")
                tokens = record["blocks"][-1]["plain"]["tokens"]
                theirs["tokens_per_s"] = round(tokens / (plain + theirs["capture_s"]), 1)
            record["speculators"] = theirs

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        if self.server:
            self.server.close()
        for name in self.case.formats:
            store = f"{self.case.name}-{name}"
            (self.args.work / store).unlink(missing_ok=True)
            for place in (self.args.work / f"{store}-disk", Path(self.spec["memory"]) / store):
                shutil.rmtree(place, ignore_errors=True)


def seconds(blocks: list[dict], name: str) -> float:
    """Median of a block's generating time."""
    return statistics.median(block[name]["generating_s"] for block in blocks)


def sustained(block: dict) -> float:
    """Tokens a second after the first unit, while the writer has the ones before in hand; of one
    unit, its own."""
    units = block["units"]
    if len(units) == 1:
        return units[0]["tokens"] / units[0]["end_s"]
    tokens = sum(unit["tokens"] for unit in units[1:])
    return tokens / (units[-1]["end_s"] - units[0]["end_s"])


def spread(name: str, values: list[float]) -> dict:
    """Median and range."""
    ends = [round(min(values), 4), round(max(values), 4)]
    return {name: round(statistics.median(values), 4), f"{name}_range": ends}


def summary(blocks: list[dict]) -> dict:
    """Rates of each capturing side against the plain one, block by block."""

    def rate(side: dict, until: str) -> float:
        return side["tokens"] / side[until]

    plain = [rate(block["plain"], "generating_s") for block in blocks]
    found: dict[str, Any] = {"plain_tokens_per_s": round(statistics.median(plain), 1)}
    found["plain_range"] = [round(min(plain), 1), round(max(plain), 1)]
    found["capture"] = {}
    for name in {name: None for block in blocks for name in block if name != "plain"}:
        pairs = [(block[name], block["plain"]) for block in blocks if name in block]
        own = [c for c, _ in pairs]
        checked = sum(c["checks"]["greedy_checked"] for c in own)
        agree = sum(c["checks"]["greedy_agree"] for c in own)
        states = sum(c["state_tokens"] for c in own)
        whole, generating = (
            [rate(c, until) / rate(p, "generating_s") for c, p in pairs]
            for until in ("total_s", "generating_s")
        )
        kept = spread("sustained_ratio", [sustained(c) / sustained(p) for c, p in pairs])
        tail = statistics.median(c["total_s"] - c["generating_s"] for c in own)
        # In units of plain generation: n of them take n / sustained_ratio, and the tail once.
        once = tail / statistics.median(p["generating_s"] / len(p["units"]) for _, p in pairs)
        at = {n: round(n / (n / kept["sustained_ratio"] + once), 4) for n in (10, 100)}
        found["capture"][name] = {
            "blocks": len(own),
            "tokens_per_s": round(statistics.median(rate(c, "total_s") for c in own), 1),
            **kept,
            "tail_s": round(tail, 3),
            **spread("ratio", whole),
            "ratio_at_units": at,
            **spread("generating_ratio", generating),
            "bytes_per_token": round(sum(c["bytes"] for c in own) / states, 1) if states else None,
            "waits": own[-1]["waits"],
            "greedy_agreement": agree / checked if checked else None,
            "faults": sum(c["checks"].get("faults", 0) for c in own),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/capture_bench"))
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct, a dense folder")
    parser.add_argument("--smollm2-nvfp4", type=Path, help="the same in NVFP4")
    parser.add_argument("--peers", type=Path, help="where speculators 0.9.0 lies unpacked")
    parser.add_argument("--seconds", type=float, default=0, help="of blocks for each target")
    parser.add_argument("--blocks", type=int, default=3, help="at least")
    parser.add_argument("--seqs", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=256, help="prompts of a unit")
    parser.add_argument("--units", type=int, default=3, help="units of a block")
    parser.add_argument("--limit", type=float, default=300, help="seconds for any one answer")
    parser.add_argument(
        "--own-process", action="store_true", help="vLLM's engine core apart, as it is by default"
    )
    parser.add_argument("--apart", type=Path, help="folder in memory; see above")
    parser.add_argument("--skip-lfm2", action="store_true")
    add_turn(parser)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    from benchmarks.lib.record import begin, pick, save

    args.work.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        args.seconds, args.blocks = 0, 1
    cases = []
    dense, nvfp4, aux = args.smollm2, args.smollm2_nvfp4, (2, 15, 27)
    if dense:
        cases.append(Case("smollm2-135m-bf16", dense, dense, aux))
    if not args.skip_lfm2:
        cases.append(dummy_lfm2(args.work, args.tiny))
    if nvfp4:
        cases.append(Case("smollm2-135m-nvfp4", nvfp4, nvfp4, aux, formats=("bf16",), peer=False))
    about = {
        **begin("capture"),
    }
    running = [Running(case, args, 8765 + i) for i, case in enumerate(cases)]

    def write(_: dict) -> None:
        cases = [case.record for case in running]
        names = ("plain_tokens_per_s", "plain_range", "capture", "decode_against_prefill")
        figures = {case["name"]: pick(case, *names) for case in cases}
        save(args.out / "capture.json", about | {"cases": cases}, figures)

    try:
        for case in running:
            case.measure(write)
            shown = {k: v for k, v in case.record.items() if k not in (*case.engines, "blocks")}
            print(json.dumps(shown, indent=1), flush=True)
    finally:
        for case in running:
            case.close()
    sys.exit(any("failed" in case.record for case in running))


if __name__ == "__main__":
    main()
