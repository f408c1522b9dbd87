"""An auxiliary state is the target's stream where it was taken, also after the next layer has run.

The stream that enters the first layer is all in one tensor, and vLLM hands out that tensor itself.
In eager mode on a GPU the layer's fused add and norm then writes into it, so that the state of id 0
is the sum at some later place. Compiled code does not: there writes become new tensors.
"""

from types import SimpleNamespace

import torch
from vllm.model_executor.models.interfaces import EagleModelMixin

from .patch import Replacement, original


def needed() -> bool:
    """Whether a state changes with the tensor that it was taken of."""
    take, stream = original(EagleModelMixin, "_maybe_add_hidden_state"), torch.zeros(1)
    states: list[torch.Tensor] = []
    take(SimpleNamespace(aux_hidden_state_layers=(0,)), states, 0, stream, None)
    stream += 1
    return bool(states[0] == stream)


def _copied(stock):
    def _maybe_add_hidden_state(self, aux_hidden_states, layer_idx, hidden_states, residual):
        if residual is None and layer_idx in self.aux_hidden_state_layers:
            hidden_states = hidden_states.clone()
        return stock(self, aux_hidden_states, layer_idx, hidden_states, residual)

    return _maybe_add_hidden_state


REPLACEMENTS = (
    Replacement(
        "vllm.model_executor.models.interfaces:EagleModelMixin._maybe_add_hidden_state",
        "self aux_hidden_states layer_idx hidden_states residual",
        _copied,
    ),
)
