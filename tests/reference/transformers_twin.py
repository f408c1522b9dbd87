"""The target's hidden states from plain transformers: what the engine's are tested against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from drafthead.errors import DraftheadError


class TransformersTwin:
    """A target loaded in transformers, slow and plain.

    Args:
        path: folder of an unquantized target.
        dtype: to compute in.
        device: to compute on.
    """

    def __init__(self, path: Path | str, dtype: torch.dtype, device: str = "cpu"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

        config = AutoConfig.from_pretrained(path)
        alone = config.get_text_config() is config
        kind = AutoModelForCausalLM if alone else AutoModelForMultimodalLM
        self.model = kind.from_pretrained(path, dtype=dtype).to(device).eval()
        decoder = self.model.get_decoder()
        self._layers = decoder.layers
        for name in ("norm", "embedding_norm"):  # LFM2 calls its final norm embedding_norm
            if hasattr(decoder, name):
                self._norm = getattr(decoder, name)
                return
        raise DraftheadError(f"{path}: no final norm found in {type(decoder).__name__}")

    @torch.no_grad()
    def states(self, ids: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
        """[T, L, Ht]: the stream that enters each of ``layers``; id ``num_layers`` is the one that
        enters the final norm. One sequence, one forward pass, no cache."""
        seen: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_: Any, args: tuple, kwargs: dict) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                seen[layer] = hidden[0].detach().clone()

            return hook

        modules = [*self._layers, self._norm]
        hooks = [
            modules[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in set(layers)
        ]
        try:
            self.model(torch.tensor([list(ids)], device=self.model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([seen[i] for i in layers], dim=1)

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], max_new_tokens: int, eos: Sequence[int]) -> list[int]:
        """The greedy answer, recomputed from the start for each token."""
        written: list[int] = []
        while len(written) < max_new_tokens and not (written and written[-1] in eos):
            tokens = torch.tensor([[*ids, *written]], device=self.model.device)
            written.append(int(self.model(tokens, use_cache=False).logits[0, -1].argmax()))
        return written
