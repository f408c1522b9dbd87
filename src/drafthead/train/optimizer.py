"""AdamW, and Muon, with exact fp32 masters that cost two bytes a weight instead of four.

A bf16 weight is the upper half of its fp32 master, rounded to nearest; the lower half lies beside
it as int16. Nothing is stored twice, and a step reads and writes each number once. fp32 weights (on
a CPU) are their own masters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 rounded to nearest, ties away from zero; int16 of what is missing)."""
    bits = master.view(torch.int32)
    top = (bits + 0x8000) >> 16
    return top.to(torch.int16).view(torch.bfloat16), (bits - (top << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a weight: undoes `split` exactly."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


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


def orthogonalize(x: Tensor) -> Tensor:
    """A matrix with about the singular vectors of x [n, m] and singular values near 1: Muon's
    Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon/), in bf16 on a GPU."""
    wide = x.bfloat16() if x.is_cuda else x
    wide = wide.t() if len(x) > x.shape[1] else wide
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.t()
        gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, gram, wide, beta=3.4445)
    return (wide.t() if len(x) > x.shape[1] else wide).to(x.dtype)


def muon_update(
    master: Tensor, grad: Tensor, mean: Tensor, scale: Tensor, rate: float, decay: float
) -> None:
    """One Muon step in place, all fp32: Nesterov momentum 0.95, orthogonalized, its size matched to
    AdamW's (0.2 sqrt(max(n, m)), arXiv 2502.16982), so that one learning rate serves both. A NaN in
    `scale` leaves everything as it is."""
    finite = scale.isfinite()
    grad = torch.where(finite, grad.float() * scale, 0.0)
    new = torch.lerp(mean, grad, 0.05)
    step = orthogonalize(torch.lerp(grad, new, 0.95)) * (0.2 * max(grad.shape) ** 0.5 * rate)
    mean.copy_(torch.where(finite, new, mean))
    master.copy_(torch.where(finite, master * (1 - rate * decay) - step, master))


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters; the learning rate comes with each step."""

    muon: bool = False
    """Step the matrices of the layers and `fc` by Muon; the LM head and vectors by AdamW."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class AdamW:
    """Steps named parameters, clipped by global norm, without waiting for the device.

    parameters: (name, bf16 or fp32 parameter). Vectors (norm weights) get no weight decay.
    total: adds up tensors in place over processes that hold shards of the parameters; None where
    they are whole.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        settings: AdamWSettings,
        total: Callable[[list[Tensor]], None] | None = None,
    ):
        self.parameters, self.total = dict(parameters), total
        self.settings = settings
        self.steps = 0
        zeros = lambda p, dtype: torch.zeros_like(p, dtype=dtype)
        named = self.parameters.items()
        muon = {n for n, p in named if settings.muon and p.dim() == 2 and "lm_head" not in n}
        self.mean = {n: zeros(p, torch.float32) for n, p in named}
        self.square = {n: zeros(p, torch.float32) for n, p in named if n not in muon}
        self.low = {n: zeros(p, torch.int16) for n, p in named if p.dtype == torch.bfloat16}

    def gradients(self) -> list[Tensor]:
        """The gradients that there are, in the parameters' order."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(self, rate: float, count: Tensor) -> Tensor:
        """One step with gradients that are sums over `count` rows (a scalar tensor).

        Divides by `count`, clips to the global norm, and leaves all weights as they are where that
        norm is not finite. Returns the norm before clipping, a scalar fp32 tensor.
        """
        s, self.steps = self.settings, self.steps + 1
        norms = torch._foreach_norm(self.gradients(), 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.total is not None:
            squared = norm**2
            self.total([squared])
            norm = squared.sqrt()
        norm = norm / count
        scale = torch.clamp(s.max_grad_norm / (norm + 1e-6), max=1.0) / count
        scale = torch.where(norm.isfinite(), scale, torch.nan)
        corrections = 1 - s.beta1**self.steps, 1 - s.beta2**self.steps
        for name, p in self.parameters.items():
            if p.grad is None or not p.numel():
                continue
            decay = s.weight_decay if p.dim() > 1 else 0.0
            numbers = rate, s.beta1, s.beta2, s.eps, decay, *corrections
            fused = p.is_cuda and name in self.low and name in self.square
            if fused:
                from drafthead.train.kernels import split_adamw

                moments = self.mean[name], self.square[name]
                split_adamw(p.data, self.low[name], p.grad, *moments, scale, *numbers)
                p.grad = None
                continue
            master = join(p.data, self.low[name]) if name in self.low else p.data
            if name in self.square:
                update(master, p.grad, self.mean[name], self.square[name], scale, *numbers)
            else:
                muon_update(master, p.grad, self.mean[name], scale, rate, decay)
            if name in self.low:
                high, low = split(master)
                p.data.copy_(high)
                self.low[name].copy_(low)
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
            high, low = split(master.to(p.device, torch.float32).contiguous())
            p.data.copy_(high)
            self.low[name].copy_(low)
        else:
            p.data.copy_(master)
