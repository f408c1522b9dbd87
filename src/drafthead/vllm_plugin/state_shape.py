"""Pages of LFM2's conv states are planned with the columns that speculation adds.

``ShortConv.get_state_shape`` has a column for every speculative token; the shape from which the
page sizes are planned leaves them out. Once the state outgrows its page, an assertion ends the
engine at start.
"""

from types import SimpleNamespace

from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.model_executor.models.lfm2 import Lfm2ForCausalLM
from vllm.model_executor.models.lfm2_moe import Lfm2MoeForCausalLM

from .patch import Replacement, original


def needed() -> bool:
    """Whether the planned shape does not grow with the tokens drafted."""

    def shape(model: type, drafts: int) -> tuple:
        hf = SimpleNamespace(conv_dim=8, hidden_size=8, conv_L_cache=3)
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            model_config=SimpleNamespace(hf_config=hf),
            num_speculative_tokens=drafts,
        )
        return original(model, "get_mamba_state_shape_from_config")(model, config)

    return any(shape(m, 0) == shape(m, 3) for m in (Lfm2ForCausalLM, Lfm2MoeForCausalLM))


def _planned(width: str):
    def make(_):
        def get_mamba_state_shape_from_config(cls, vllm_config) -> tuple[tuple[int, int]]:
            config = vllm_config.model_config.hf_config
            return MambaStateShapeCalculator.short_conv_state_shape(
                tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
                intermediate_size=getattr(config, width),
                conv_kernel=config.conv_L_cache,
                num_spec=vllm_config.num_speculative_tokens,
            )

        return get_mamba_state_shape_from_config

    return make


_MODELS = "vllm.model_executor.models."
REPLACEMENTS = (
    Replacement(
        f"{_MODELS}lfm2:Lfm2ForCausalLM.get_mamba_state_shape_from_config",
        "cls vllm_config",
        _planned("conv_dim"),
    ),
    Replacement(
        f"{_MODELS}lfm2_moe:Lfm2MoeForCausalLM.get_mamba_state_shape_from_config",
        "cls vllm_config",
        _planned("hidden_size"),
    ),
)
