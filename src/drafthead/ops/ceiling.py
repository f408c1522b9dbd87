"""How many floating-point operations a device can do."""

import time

import torch


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured operations per second of a large square matrix product: the ceiling for MFU."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * size**3 / best
