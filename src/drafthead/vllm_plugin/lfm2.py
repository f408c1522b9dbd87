"""LFM2 and LFM2-MoE with EAGLE-3's auxiliary hidden states.

Registered in place of vLLM's own classes, which are their bases; imported only when such a model
is served, and then applies the mends that concern it alone.
"""

from itertools import islice

import torch
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models import lfm2, lfm2_moe
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    SupportsEagle3,
    supports_eagle3,
)
from vllm.sequence import IntermediateTensors

from . import COST_MENDS, MODEL_MENDS, apply
from .patch import step_aside


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


@support_torch_compile
class Lfm2ModelWithAuxStates(_AuxStates, lfm2.Lfm2Model):
    pass


@support_torch_compile
class Lfm2MoeModelWithAuxStates(_AuxStates, lfm2_moe.Lfm2MoeModel):
    pass


def _check_pipeline(vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if speculative is not None and stages > 1 and not vllm_config.use_v2_model_runner:
        raise ValueError(
            f"pipeline_parallel_size={stages} with speculative decoding "
            f"(method {speculative.method!r}) needs vLLM's newer model runner, which is not in "
            "use here. Use tensor parallelism, or set VLLM_USE_V2_MODEL_RUNNER=1 on a GPU."
        )


class Lfm2ForCausalLM(lfm2.Lfm2ForCausalLM, SupportsEagle3):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _check_pipeline(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class Lfm2MoeForCausalLM(lfm2_moe.Lfm2MoeForCausalLM, SupportsEagle3):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _check_pipeline(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


if supports_eagle3(lfm2_moe.Lfm2MoeForCausalLM) and supports_eagle3(lfm2.Lfm2ForCausalLM):
    step_aside("aux_states")
    Lfm2ForCausalLM = lfm2.Lfm2ForCausalLM  # type: ignore[misc]
    Lfm2MoeForCausalLM = lfm2_moe.Lfm2MoeForCausalLM  # type: ignore[misc]
else:
    # The constructors of the bases look these up by name.
    lfm2.Lfm2Model = Lfm2ModelWithAuxStates
    lfm2_moe.Lfm2MoeModel = Lfm2MoeModelWithAuxStates
apply(MODEL_MENDS + COST_MENDS)
