"""The processes of a training run under torchrun; alone, a world of one."""

import itertools
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from drafthead.errors import DraftheadError
from drafthead.machine import torchrun_rank
from drafthead.recipe import TrainSection
from drafthead.train.log import import_trackers

_GROUPS = itertools.count()
"""Numbers the groups that this process has joined, as the others do."""


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_environment(cls) -> "World":
        """What torchrun says of this process; alone if nothing. The others are not waited for.

        Raises:
            DraftheadError: more processes on this machine than GPUs, or as `torchrun_rank`.
        """
        rank, size = torchrun_rank(), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if not torch.cuda.is_available():
            return cls(rank, size, torch.device("cpu"))
        if local >= torch.cuda.device_count():
            raise DraftheadError(
                f"process {local} of this machine has no GPU: {torch.cuda.device_count()} to be "
                "seen; start as many processes (torchrun --nproc-per-node)"
            )
        return cls(rank, size, torch.device("cuda", local))

    @classmethod
    def join(cls) -> "World":
        """Join the processes that torchrun started, with NCCL on GPUs and Gloo on CPUs, and wait
        until all have.

        Raises:
            DraftheadError: as `of_environment`; or the environment does not say where they meet.
        """
        world = cls.of_environment()
        gpu, size = world.device.type == "cuda", world.size
        if gpu:
            torch.cuda.set_device(world.device)
        if size > 1 and not dist.is_initialized():
            # Workers that torchrun starts again meet in the store of those that died, and would
            # take a dead one's address for the new one's: each start gets names of its own. So does
            # each group of one start, which trains one head after the other.
            try:
                store, rank, size = next(dist.rendezvous("env://"))
            except ValueError as error:
                raise DraftheadError(
                    f"WORLD_SIZE={size}, but {error}; start with torchrun, or unset WORLD_SIZE"
                ) from None
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(
                "nccl" if gpu else "gloo",
                store=dist.PrefixStore(f"attempt-{attempt}-{next(_GROUPS)}", store),
                rank=rank,
                world_size=size,
                # Evaluation and checkpoints let the others wait: longer than NCCL's ten minutes.
                timeout=timedelta(hours=1),
            )
            # NCCL's join does not wait; the first process joins with the folder in order.
            world.barrier()
        return world

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


def check(settings: TrainSection, rows: int, world: World) -> None:
    """Whether `world` can train in steps of `rows` rows.

    Raises:
        DraftheadError: more processes than rows, or a tracker that is not installed.
    """
    size = world.size
    if rows < size:
        raise DraftheadError(
            f"{size} processes for steps of {rows} rows: set train.rows_per_step to {size} or "
            "more, or start fewer processes"
        )
    if world.first:
        import_trackers(settings.track)
