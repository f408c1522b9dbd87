"""LFM2 and LFM2-MoE with EAGLE-3's auxiliary hidden states.

Registered in place of vLLM's own classes (aux_states.py), which are their bases; imported only when
such a model is served, and then applies the patches that concern it alone.
"""

import importlib
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    SupportsEagle3,
    supports_eagle3,
)
from vllm.sequence import IntermediateTensors

from . import registry
from .aux_states import CLASSES


class _AuxStates(EagleModelMixin):
    """The forward of both decoders; it also returns the residual stream entering given layers."""

    supports_aux_hidden_states_over_pp = True

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states [tokens, hidden]; with aux layers set, also a list of the same shape.

        Aux id i is the residual stream that enters layer i; id ``num_layers`` is the final stream
        before the last norm.
        """
        aux_states: list[torch.Tensor] = []
        if get_pp_group().is_first_rank:
            hidden = inputs_embeds if inputs_embeds is not None else self.embed_input_ids(input_ids)
            residual = None
            if 0 in self.aux_hidden_state_layers:
                # The first layer's fused add and norm writes into this very tensor.
                aux_states.append(hidden.clone())
        else:
            assert intermediate_tensors is not None
            hidden = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        received = self.collect_remote_aux_hidden_states(intermediate_tensors)
        layers = islice(self.layers, self.start_layer, self.end_layer)
        for index, layer in enumerate(layers, start=self.start_layer + 1):
            hidden, residual = layer(positions=positions, hidden_states=hidden, residual=residual)
            self._maybe_add_hidden_state(aux_states, index, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors(
                {
                    "hidden_states": hidden,
                    "residual": residual,
                    **self.pack_local_aux_hidden_states(aux_states),
                }
            )
        hidden, _ = self.embedding_norm(hidden, residual)
        aux_states = received + aux_states
        return (hidden, aux_states) if aux_states else hidden


def _check_pipeline(vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if speculative is not None and stages > 1 and not vllm_config.use_v2_model_runner:
        raise ValueError(
            f"pipeline_parallel_size={stages} with speculative decoding "
            f"(method {speculative.method!r}) needs vLLM's newer model runner, which is not in "
            "use here. Use tensor parallelism, or set VLLM_USE_V2_MODEL_RUNNER=1 on a GPU."
        )


def with_hook(name: str) -> type[nn.Module]:
    """vLLM's class ``name`` with the hook, or as it is where it has one."""
    module = importlib.import_module(CLASSES[name])
    stock: Any = getattr(module, name)
    patch = registry.named("aux_states")
    if registry.skipped(patch.name):
        return stock
    if supports_eagle3(stock):
        registry.record(registry.Status(patch, registry.State.stepped_aside))
        return stock
    decoder_name = name.replace("ForCausalLM", "Model")
    decoder = getattr(module, decoder_name)
    if not issubclass(decoder, EagleModelMixin):
        made = type(decoder_name, (_AuxStates, decoder), {"__module__": decoder.__module__})
        # The constructor of the base looks it up by name.
        setattr(module, decoder_name, support_torch_compile(made))

    class Target(stock, SupportsEagle3):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            _check_pipeline(vllm_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    Target.__name__ = Target.__qualname__ = name
    return Target


def __getattr__(name: str) -> type[nn.Module]:
    """The class that vLLM asks this module for, made when it is first asked for."""
    if name not in CLASSES:
        raise AttributeError(name)
    globals()[name] = made = with_hook(name)
    return made


registry.apply(registry.rows("lfm2"))
