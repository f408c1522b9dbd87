"""AdamW, and Muon for matrices, with the exact fp32 masters of `split_fp32.py`.

A step of AdamW reads and writes each number once. fp32 weights (on a CPU) are their own masters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from drafthead.ops.graphs import Graphs
from drafthead.train.muon import Muon
from drafthead.train.split_fp32 import join, keep


def update(
    master: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor,
    rate: float, beta1: float, beta2: float, eps: float, decay: float, correct1: float,
    correct2: float,
) -> None:  # fmt: skip
    """One AdamW step (arXiv 1711.05101, algorithm 2) in place, all fp32.

    The gradient is multiplied by `scale` (a scalar tensor) first; a NaN there leaves everything as
    it is. correct1 and correct2 are 1 - beta ** step.
    """
    if scale.isnan():
        return
    grad = grad.float() * scale
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    master.mul_(1 - rate * decay)
    master.addcdiv_(mean, (square / correct2).sqrt_().add_(eps), value=-rate / correct1)


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters; the learning rate comes with each step."""

    muon: bool = False
    """Step matrices by Muon; the LM head, embeddings and vectors by AdamW."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    lm_head_rate: float = 1.0
    """The LM head's learning rate, as a share of that of a step."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class AdamW:
    """Steps named parameters, clipped by global norm, without waiting for the device.

    parameters: (name, bf16 or fp32 parameter). Vectors (norm weights) get no weight decay.
    graphs: what Muon's steps are replayed by. by_muon: whether it steps the matrix of that name.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        settings: AdamWSettings,
        graphs: Graphs | None = None,
        by_muon: Callable[[str], bool] = lambda name: "lm_head" not in name,
    ):
        self.parameters = dict(parameters)
        self.settings = settings
        self.steps = 0
        zeros = lambda p, dtype: torch.zeros_like(p, dtype=dtype)
        named = self.parameters.items()
        muon = {n: p for n, p in named if settings.muon and p.dim() == 2 and by_muon(n)}
        self.muon = Muon(muon, graphs or Graphs(torch.device("cpu")))
        rest = {n: p for n, p in named if n not in muon}
        self.mean = {n: zeros(p, torch.float32) for n, p in rest.items()}
        self.square = {n: zeros(p, torch.float32) for n, p in rest.items()}
        self.low = {n: zeros(p, torch.int16) for n, p in rest.items() if p.dtype == torch.bfloat16}
        for stack in self.muon.stacks:  # under their names, for what reads and writes a checkpoint
            self.mean |= dict(zip(stack.parameters, stack.mean))
            self.low |= dict(zip(stack.parameters, () if stack.low is None else stack.low))

    def gradients(self) -> list[Tensor]:
        """The gradients that there are, in the parameters' order."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(self, rate: float, count: Tensor) -> Tensor:
        """One step with gradients that are sums over `count` rows (a scalar tensor).

        Divides by `count`, clips to the global norm, and leaves all weights as they are where that
        norm is not finite, or where no process had a row. Returns the norm before clipping, a
        scalar fp32 tensor.
        """
        s, self.steps = self.settings, self.steps + 1
        if not self.gradients():
            return torch.zeros_like(count)
        norms = torch._foreach_norm(self.gradients(), 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        rows = count.clamp(min=1)
        norm = norm / rows
        scale = torch.clamp(s.max_grad_norm / (norm + 1e-6), max=1.0) / rows
        scale = torch.where(norm.isfinite() & (count > 0), scale, torch.nan)
        corrections = 1 - s.beta1**self.steps, 1 - s.beta2**self.steps
        self.muon.step(scale, rate, s.weight_decay)
        for name, square in self.square.items():
            p = self.parameters[name]
            if p.grad is None or not p.numel():
                continue
            decay = s.weight_decay if p.dim() > 1 else 0.0
            share = s.lm_head_rate if "lm_head" in name else 1.0
            numbers = rate * share, s.beta1, s.beta2, s.eps, decay, *corrections
            moments = self.mean[name], square
            if p.is_cuda and name in self.low:
                from drafthead.train.kernels import split_adamw

                split_adamw(p.data, self.low[name], p.grad, *moments, scale, *numbers)
            elif name in self.low:
                master = join(p.data, self.low[name])
                update(master, p.grad, *moments, scale, *numbers)
                keep(master, p.data, self.low[name])
            else:
                update(p.data, p.grad, *moments, scale, *numbers)
            p.grad = None
        return norm

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights by name, on the CPU."""
        return {
            n: join(p.data.cpu(), self.low[n].cpu()) if n in self.low else p.data.float().cpu()
            for n, p in self.parameters.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and moments as fp32 tensors on the CPU, whatever the device and dtype."""
        return {
            **{f"master.{n}": t for n, t in self.masters().items()},
            **{f"mean.{n}": t.cpu() for n, t in self.mean.items()},
            **{f"square.{n}": t.cpu() for n, t in self.square.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], steps: int) -> None:
        """Take what `state_dict` gave after `steps` steps, weights included."""
        self.steps = steps
        for name in self.parameters:
            self.mean[name].copy_(state[f"mean.{name}"])
            if name in self.square:
                self.square[name].copy_(state[f"square.{name}"])
            self.load_master(name, state[f"master.{name}"])

    @torch.no_grad()
    def load_master(self, name: str, master: Tensor) -> None:
        """Set a weight from its fp32 master."""
        p = self.parameters[name]
        if name in self.low:
            keep(master.to(p.device, torch.float32).contiguous(), p.data, self.low[name])
        else:
            p.data.copy_(master)
