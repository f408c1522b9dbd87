"""speculators 0.9.0 as the other side of a benchmark: its model, its batches, its step.

Imported by train/step.py and quality.py. `find` makes it importable; what it imports at start but
never calls in training (its vLLM client, its data set readers) is replaced by nothing if missing.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafthead.head.config import HeadConfig
from drafthead.states import Sample

NOT_CALLED = ("openai", "datasets", "hs_connectors", "aiohttp", "httpx", "loguru")


def find(folder: Path | None) -> None:
    """Make speculators importable from `folder` (see `peers/pack`), or as it is installed."""
    if folder:
        sys.path.insert(0, str(folder))
    missing = [name for name in NOT_CALLED if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Nothings(missing))


class _Nothings(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of the given names whose every member is an empty class."""

    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def member(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__dict__["__getattr__"] = member


def llama_config(config: HeadConfig) -> Any:
    """The layer of `config` as transformers describes it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=None,
    )


def make_model(config: HeadConfig, device: torch.device) -> Any:
    """Its draft model in the shape of `config`, weights as it initialises them; the target's side
    (embedding, norm, LM heads) is to be filled with `give_target`."""
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel

    layer = llama_config(config)
    if device.type != "cuda":  # flex attention without torch.compile would be all mask
        layer._attn_implementation = "eager"
    about = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=config.draft_vocab_size,
        eagle_aux_hidden_state_layer_ids=list(config.aux_layer_ids),
        norm_before_residual=config.norm_before_residual,
        norm_before_fc=config.norm_before_fc,
        norm_output=config.norm_output,
    )
    with torch.device(device):
        return Eagle3DraftModel(about).train()


@torch.no_grad()
def give_target(
    model: Any, embedding: Tensor, norm: Tensor, rows: Tensor, target_ids: Tensor
) -> None:
    """The target's embedding [V, H], final norm [H] and LM-head rows [Vd, H], as its
    `load_verifier_weights` sets them; target_ids int64 [Vd]: the draft vocabulary."""
    model.embed_tokens.weight.copy_(embedding)
    model.verifier_norm.weight.copy_(norm)
    model.lm_head.weight.copy_(rows)
    model.verifier_lm_head.weight.copy_(rows)
    if model.t2d is not None:
        model.t2d.zero_()
        model.t2d[target_ids.to(model.t2d.device)] = True
        order = torch.arange(len(target_ids), device=model.d2t.device)
        model.d2t.copy_(target_ids.to(order.device) - order)


class Row(dict):
    """A batch as its model takes it, by argument."""

    def to(self, device: torch.device) -> "Row":
        """On a device; to a GPU from pinned memory, as ours goes."""
        pinned = self.map(Tensor.pin_memory) if device.type == "cuda" else self
        return pinned.map(lambda x: x.to(device, non_blocking=True))

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Row":
        return Row({name: change(tensor) for name, tensor in self.items()})


def make_batch(samples: list[Sample], tokens: int, shift: int) -> Row:
    """A row as its collator packs it: token i+1 and state i+1 of the verifier at position i.

    shift: 1 takes its own loss mask (that of token i+1), 2 ours (that of the predicted token i+2),
    which it takes for the same rows and so the same loss.
    """
    lengths = [min(len(s.ids), len(s.last)) - 1 for s in samples]
    if shift == 2:
        lengths = [min(n, len(s.ids) - 2) for n, s in zip(lengths, samples)]
    used = min(sum(lengths), tokens)

    def stack(parts: list[Tensor], fill: int = 0) -> Tensor:
        out = parts[0].new_full((tokens, *parts[0].shape[1:]), fill)
        out[:used] = torch.cat(parts)[:used]
        return out[None]

    pairs = list(zip(samples, lengths))
    return Row(
        hidden_states=stack([s.aux[:n].flatten(1) for s, n in pairs]),
        verifier_last_hidden_states=stack([s.last[1 : n + 1] for s, n in pairs]),
        input_ids=stack([s.ids[1 : n + 1].long() for s, n in pairs]),
        loss_mask=stack([s.loss_mask[shift : n + shift] for s, n in pairs]),
        position_ids=stack([torch.arange(1, n + 1) for _, n in pairs]),
        document_ids=stack([torch.full((n,), i) for i, (_, n) in enumerate(pairs)], fill=-1),
    )


class Side:
    """Its training step: autocast bf16, its KL loss, clipping at 1, AdamW (fused on a GPU)."""

    def __init__(self, model: Any, ttt_steps: int, learning_rate: float, weight_decay: float):
        from speculators.losses.utils import resolve_loss_config

        self.model, self.ttt_steps = model, ttt_steps
        # Its fused loss does not compile under PyTorch 2.11.
        self.loss = resolve_loss_config("kl_div", implementation="eager")
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=learning_rate,
            weight_decay=weight_decay,
            fused=self.device.type == "cuda",
        )

    def step(self, batch: dict) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            _, loss, _ = self.model(
                **batch, ttt_steps=self.ttt_steps, ttt_step_loss_decay=1.0, loss_config=self.loss
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()
