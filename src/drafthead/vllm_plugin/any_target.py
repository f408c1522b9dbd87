"""EAGLE-3's auxiliary hidden states for targets whose vLLM class has no hook for them.

Registered in place of vLLM's own classes, which are their bases; a class is made when such a model
is served. The decoder's forward stays vLLM's. It runs on a stand-in for the decoder whose layers
also note the residual stream, so that the states are ordinary outputs of what is compiled: no
buffer, no side effect, nothing of a layer replaced. Without a head, vLLM's forward runs as it is.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    SupportsEagle3,
    supports_eagle3,
)
from vllm.sequence import IntermediateTensors

from . import registry
from .models_without_hook import AROUND, MODULES, WHOLE

_VLLM = "vllm.model_executor.models."


class _StandIn:
    """A decoder in the eyes of its own forward, but for its layers."""

    def __init__(self, decoder: nn.Module, layers: list[Callable]) -> None:
        self._decoder = decoder
        self.layers = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def _note(
    layer: nn.Module, index: int, wanted: tuple[int, ...], whole: bool, noted: list[torch.Tensor]
) -> Callable:
    """``layer``, which appends to ``noted`` the stream entering it if it is the first, and the one
    leaving it, as far as their ids are ``wanted``. Copies: kernels write into what they are given.
    """

    def call(positions: torch.Tensor, hidden: torch.Tensor, *others: Any, **named: Any) -> Any:
        if index == 0 and 0 in wanted:
            noted.append(hidden.clone())
        out = layer(positions, hidden, *others, **named)
        if index + 1 in wanted:
            stream = out[0] if isinstance(out, tuple) else out
            noted.append(stream.clone() if whole else stream + out[1])
        return out

    return call


class _AuxStates(EagleModelMixin):
    """The forward of a decoder; it also returns the residual stream entering given layers."""

    layers: nn.ModuleList
    _stock_forward: Callable
    _whole: bool

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **named: Any,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """What the stock forward returns, hidden states [tokens, hidden]; with aux layers set, also
        a list of the same shape.

        Aux id i is the residual stream that enters layer i; id ``num_layers`` is the final stream
        before the last norm. ``named`` is for multimodal wrappers, some of which pass more.
        """
        wanted = self.aux_hidden_state_layers
        decoder: Any = self
        noted: list[torch.Tensor] = []
        if wanted:
            layers = [
                _note(layer, index, wanted, self._whole, noted)
                for index, layer in enumerate(self.layers)
            ]
            decoder = _StandIn(self, layers)
        hidden = self._stock_forward(
            decoder, input_ids, positions, intermediate_tensors, inputs_embeds, **named
        )
        return (hidden, noted) if wanted else hidden


def noting(decoder: type[nn.Module], whole: bool) -> type[nn.Module]:
    """The class ``decoder``, whose layers return the ``whole`` stream or two parts, with states."""
    stock = {"_stock_forward": staticmethod(decoder.forward), "_whole": whole}
    return type(decoder.__name__, (_AuxStates, decoder), stock | {"__module__": decoder.__module__})


def with_hook(name: str) -> type[nn.Module]:
    """vLLM's class ``name`` with the hook, or as it is where it has one."""
    module = importlib.import_module(_VLLM + MODULES[name])
    stock = getattr(module, name)
    if supports_eagle3(stock):
        registry.log.info("drafthead: vLLM's %s hands out its states itself.", name)
        return stock
    if name not in AROUND:
        decoder_name = name.replace("ForCausalLM", "Model")
        decoder = getattr(module, decoder_name)
        if not issubclass(decoder, EagleModelMixin):  # Glm4Model is a LlamaModel, which has it
            # The constructor of the base looks it up by name.
            setattr(module, decoder_name, noting(decoder, name in WHOLE))

    class Target(stock, SupportsEagle3):  # type: ignore[misc, valid-type]
        def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
            if (stages := get_pp_group().world_size) > 1:
                raise ValueError(
                    f"pipeline_parallel_size={stages}: {name} cannot hand its hidden states from "
                    "stage to stage. Use tensor parallelism instead."
                )
            super().set_aux_hidden_state_layers(layers)

    Target.__name__ = Target.__qualname__ = name
    return Target


def __getattr__(name: str) -> type[nn.Module]:
    """The class that vLLM asks this module for, made when it is first asked for."""
    if name not in MODULES:
        raise AttributeError(name)
    globals()[name] = made = with_hook(name)
    return made


def apply() -> None:
    """Stand in for vLLM's own classes, none of which is imported for that."""
    from vllm import ModelRegistry

    for architecture, stock in list(ModelRegistry.models.items()):
        name, where = getattr(stock, "class_name", ""), getattr(stock, "module_name", "")
        generates = architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))
        if generates and where == _VLLM + MODULES.get(name, "?"):
            ModelRegistry.register_model(architecture, f"{__name__}:{name}")
