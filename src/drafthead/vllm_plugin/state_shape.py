"""Pages of LFM2's conv states are planned with the columns that speculation adds.

``ShortConv.get_state_shape`` has a column for every speculative token; the shape from which the
page sizes are planned leaves them out. Once the state outgrows its page, an assertion ends the
engine at start.
"""

import inspect

from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.model_executor.models.lfm2 import Lfm2ForCausalLM
from vllm.model_executor.models.lfm2_moe import Lfm2MoeForCausalLM

from .patch import step_aside


def apply() -> None:
    for model, width in ((Lfm2ForCausalLM, "conv_dim"), (Lfm2MoeForCausalLM, "hidden_size")):
        if "num_spec" in inspect.getsource(model.get_mamba_state_shape_from_config):
            step_aside("state_shape")
        else:
            model.get_mamba_state_shape_from_config = _planned(width)


def _planned(width: str) -> classmethod:
    def get_mamba_state_shape_from_config(cls, vllm_config) -> tuple[tuple[int, int]]:
        config = vllm_config.model_config.hf_config
        return MambaStateShapeCalculator.short_conv_state_shape(
            tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
            intermediate_size=getattr(config, width),
            conv_kernel=config.conv_L_cache,
            num_spec=vllm_config.num_speculative_tokens,
        )

    return classmethod(get_mamba_state_shape_from_config)
