"""An auxiliary state is the target's stream where it was taken, also after the next layer has run.

The stream that enters the first layer is all in one tensor, and vLLM hands out that tensor itself.
In eager mode on a GPU the layer's fused add and norm then writes into it, so that the state of id 0
is the sum at some later place. Compiled code does not: there writes become new tensors.
"""

from vllm.model_executor.models.interfaces import EagleModelMixin

from .patch import still_has, wrap

# With its end: a vLLM that copies would go on in the same line.
FAULT = "value = hidden_states + residual if residual is not None else hidden_states\n"


def apply() -> None:
    if still_has(EagleModelMixin._maybe_add_hidden_state, FAULT, "aux_copies"):
        wrap(EagleModelMixin, "_maybe_add_hidden_state", _copied)


def _copied(stock):
    def _maybe_add_hidden_state(self, aux_hidden_states, layer_idx, hidden_states, residual):
        if residual is None and layer_idx in self.aux_hidden_state_layers:
            hidden_states = hidden_states.clone()
        return stock(self, aux_hidden_states, layer_idx, hidden_states, residual)

    return _maybe_add_hidden_state
