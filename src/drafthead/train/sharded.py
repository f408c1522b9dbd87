"""A head whose weights, gradients and optimizer state are spread over processes (FSDP2).

For heads whose optimizer state outgrows a card: a process keeps 1/n of the masters and moments
(12 bytes a weight) and, between steps, of the bf16 weights and gradients. All weights are one FSDP
group: they are gathered once for a row's forward and backward, which is all the exchange there is
besides the scattering of gradients.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from drafthead.head.model import Eagle3Head
from drafthead.train.batches import Batch
from drafthead.train.parallel import World
from drafthead.train.step import TrainStep


class _Whole(nn.Module):
    """Head and loss as one forward, so that FSDP's hooks stand around all of a row's work."""

    def __init__(self, step: TrainStep):
        super().__init__()
        self.head, self.step = step.head, step

    def forward(self, batch: Batch | None) -> tuple[Tensor, Tensor]:
        if batch is None:  # the others gather and scatter in this row: so must this process
            nothing = sum((p * 0).sum() for p in self.head.parameters())
            assert isinstance(nothing, Tensor)
            return nothing, torch.zeros(self.step.objective.steps, device=nothing.device)
        return self.step.loss(batch)


class ShardedStep:
    """`TrainStep` over a sharded head. Every process must take part in every call but `part`.

    `parameters` are this process's shards by name: rows of the whole weight, perhaps none. They are
    what the optimizer steps.
    """

    def __init__(self, step: TrainStep, world: World):
        self.world, self.head = world, step.head
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.module = fully_shard(_Whole(step), mesh=self.mesh, reshard_after_forward=False)
        # Gradients are sums over rows, not means over processes.
        self.module.set_gradient_divide_factor(1.0)
        self.module.set_force_sum_reduction_for_comms(True)
        named = dict(step.head.named_parameters())
        self._sharded: dict[str, DTensor] = {n: p for n, p in named.items() if _is_sharded(p)}
        assert self._sharded.keys() == named.keys()
        self.parameters = {n: p.to_local().detach() for n, p in self._sharded.items()}

    def backward(self, batch: Batch | None, last: bool) -> tuple[Tensor, Tensor]:
        """As `TrainStep.backward`; with `last`, the last row of a step, gradients are summed over
        processes and each shard's lies in its `grad`."""
        self.module.set_requires_gradient_sync(last)
        loss, correct = self.module(batch)
        loss.backward()
        if last:
            for name, p in self._sharded.items():
                if isinstance(p.grad, DTensor):
                    self.parameters[name].grad = p.grad.to_local()
                    p.grad = None
        return loss.detach(), correct

    def whole_head(self) -> Eagle3Head:
        """A copy of the head with all its weights, on this process's device."""
        with torch.device(self.world.device):
            head = Eagle3Head(self.head.config)
        head.set_vocab(self.head.d2t)
        head.load_state_dict({n: p.full_tensor() for n, p in self._sharded.items()}, strict=False)
        return head.to(next(iter(self.parameters.values())).dtype)

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An optimizer's state by `KIND.PARAMETER`, gathered to the CPU."""
        found = {}
        for key, shard in state.items():
            like = self._sharded[key.partition(".")[2]]
            full = DTensor.from_local(
                shard.to(self.world.device), self.mesh, [Shard(0)], run_check=False,
                shape=like.shape, stride=like.stride(),
            )  # fmt: skip
            found[key] = full.full_tensor().cpu()
        return found

    def part(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undoes `whole`: this process's rows."""

        def own(full: Tensor) -> Tensor:
            pieces = full.chunk(self.world.size)
            return pieces[self.world.rank] if self.world.rank < len(pieces) else full[:0]

        return {key: own(full).contiguous() for key, full in state.items()}


def _is_sharded(p: Tensor) -> bool:
    return isinstance(p, DTensor)
