"""What a row of the draft vocabulary costs: the head's last matrix product, timed by itself."""

import statistics
import time

import torch

# More than any last-level cache holds: in serving, a step's other weights have been read between
# two reads of the LM head.
_SPREAD_BYTES = 512 << 20
_REPEATS = 9


def row_seconds(
    hidden_size: int, rows: int, tokens: int, *, device: str, dtype: torch.dtype
) -> float:
    """Seconds that one more row of the head's LM head adds to one draft step.

    The product [tokens, H] x [H, rows] is timed at the number of rows and at twice it; what both
    have in common (the launch, the read of the input) drops out of the difference.

    Args:
        hidden_size: H, the head's width.
        rows: the draft vocabulary's size, about which the cost is taken.
        tokens: requests that draft at once.
        device: ``cuda`` or ``cpu``.
        dtype: of the head in the engine.
    """

    def product(n: int) -> float:
        size = n * hidden_size * dtype.itemsize
        weights = [
            torch.zeros(n, hidden_size, device=device, dtype=dtype)
            for _ in range(max(2, -(-_SPREAD_BYTES // size)))
        ]
        states = torch.zeros(tokens, hidden_size, device=device, dtype=dtype)
        times = []
        for _ in range(_REPEATS):
            begun = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(states, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begun) / len(weights))
        return statistics.median(times[1:])

    with torch.inference_mode():
        return max(0.0, product(2 * rows) - product(rows)) / rows
