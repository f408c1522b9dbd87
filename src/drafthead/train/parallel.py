"""The processes of a training run under torchrun; alone, a world of one."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> "World":
        """Join the processes that torchrun started, with NCCL on GPUs and Gloo on CPUs."""
        gpu = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not dist.is_initialized():
            # Workers that torchrun starts again meet in the store of those that died, and would
            # take a dead one's address for the new one's: each start gets names of its own.
            store, rank, size = next(dist.rendezvous("env://"))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(
                "nccl" if gpu else "gloo",
                store=dist.PrefixStore(f"attempt-{attempt}", store),
                rank=rank,
                world_size=size,
                # Evaluation and checkpoints let the others wait: longer than NCCL's ten minutes.
                timeout=timedelta(hours=1),
            )
        return cls(int(os.environ.get("RANK", "0")), size, device)

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up tensors over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the processes that `join` joined."""
        if dist.is_initialized():
            dist.destroy_process_group()
