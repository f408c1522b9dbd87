"""What one draft step costs at batch 1, for heads of different shapes, against the memory's limit.

    python -m benchmarks.serve.draft_shapes --out OUT            # a minute on a GPU
    python -m benchmarks.serve.draft_shapes --out OUT --tiny     # seconds on a CPU: smaller widths

A step is what a server runs for each drafted token after the first: embedding, decoder layer over
a cache of `--context` tokens, final norm, LM head over the draft vocabulary, argmax. On a GPU it is
replayed as one CUDA graph, with the L2 cache flushed before each replay (between two draft steps
of different requests' turns the target's weights pass through it); a figure is the median over
replays with the 10th and 90th percentile. Weights are random, bf16. `share_of_limit` is the least
time in which the weights can be read (`estimate_cost` over the bandwidth of a large copy, measured
in the same call) over the time taken.

Writes OUT/draft_shapes.json after every shape.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from drafthead.fsio import write_json
from drafthead.head.config import HeadConfig, estimate_cost
from drafthead.head.model import Eagle3Head
from drafthead.machine import this_machine

MISSION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_000,
    "draft_vocab_size": 32_000,
    "target_hidden_size": 2048,
    "aux_layer_ids": (2, 12, 21),
    "max_position_embeddings": 128_000,
    "rope_theta": 5e6,
}
TINY = {
    **MISSION,
    "hidden_size": 256,
    "target_hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16_000,
    "draft_vocab_size": 4_000,
}


def shapes(base: dict, tiny: bool) -> dict[str, HeadConfig]:
    """The mission's shape, and that with one figure changed."""
    scale = 8 if tiny else 1
    changes: dict[str, dict] = {"mission": {}}
    for rows in (4_000, 8_000, 16_000, 64_000, 128_000):
        changes[f"draft vocabulary {rows // scale}"] = {"draft_vocab_size": rows // scale}
    for width in (2048, 4096, 7168):
        changes[f"MLP {width // scale}"] = {"intermediate_size": width // scale}
    changes["2 layers"] = {"num_hidden_layers": 2}
    return {name: HeadConfig(**{**base, **change}) for name, change in changes.items()}


Step = Callable[[], torch.Tensor]


def draft_step(config: HeadConfig, context: int, device: torch.device) -> Step:
    """A function that drafts one token with a random head over a full cache."""
    torch.manual_seed(0)
    head = Eagle3Head(config).to(device, torch.bfloat16)
    width = (config.num_key_value_heads, context, config.head_dim)
    cache = [torch.randn(2, *width, device=device, dtype=torch.bfloat16) for _ in head.layers]
    embedding = torch.randn(
        config.vocab_size, config.hidden_size, device=device, dtype=torch.bfloat16
    )
    token = torch.tensor([1], device=device)
    position = torch.tensor([context - 1], device=device)
    hidden = torch.randn(1, config.hidden_size, device=device, dtype=torch.bfloat16)

    def attention(layer, q, k, v):
        keys, values = cache[layer]
        keys[:, -1], values[:, -1] = k[0], v[0]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], enable_gqa=True
        )
        return out[0].transpose(0, 1)

    @torch.no_grad()
    def step():
        decoded = head.decode(F.embedding(token, embedding), hidden, position, attention)
        best = head.logits(head.output(decoded)).argmax(dim=-1)
        return best + head.d2t[best]

    return step


def seconds(step: Step, device: torch.device, repeats: int) -> list[float]:
    """Times of single steps, each with cold caches on a GPU."""
    if device.type == "cpu":
        step()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return times
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy moves, read and written."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        sink.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.tiny:
        arguments.repeats = min(arguments.repeats, 20)
    limit = bandwidth(device)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.serve.draft_shapes"
        + (" --tiny" if arguments.tiny else "")
        + f" --context {arguments.context} --repeats {arguments.repeats} --out OUT",
        "machine": this_machine().as_dict(),
        "device": device.type,
        "copy_bytes_per_s": limit,
        "shapes": {},
    }
    for name, config in shapes(TINY if arguments.tiny else MISSION, arguments.tiny).items():
        times = sorted(
            seconds(draft_step(config, arguments.context, device), device, arguments.repeats)
        )
        cost = estimate_cost(config)
        median = statistics.median(times)
        cached = cost.kv_bytes_per_token * arguments.context
        result["shapes"][name] = {
            "microseconds": median * 1e6,
            "p10": times[len(times) // 10] * 1e6,
            "p90": times[-len(times) // 10 - 1] * 1e6,
            "share_of_limit": (cost.bytes_per_draft_step + cached) / limit / median,
            "cost": dataclasses.asdict(cost),
        }
        write_json(arguments.out / "draft_shapes.json", result)
        print(f"{name:24} {median * 1e6:9.1f} us  {cost.bytes_per_draft_step / 1e6:7.1f} MB")


if __name__ == "__main__":
    main()
