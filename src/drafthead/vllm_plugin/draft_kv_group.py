"""The KV cache group of an EAGLE-3 head on a hybrid target is found.

The planner locates a draft model's layers by position (they register after the target's) for MTP
only. For EAGLE it finds none on a hybrid target, warns, and then treats every group, the target's
states included, as the draft's.
"""

from vllm.v1.core import kv_cache_utils

from .patch import step_aside, still_has, wrap

FAULT = 'if spec_config.method == "mtp":'


def apply() -> None:
    stock = getattr(kv_cache_utils, "_uses_trailing_mtp_layers", None)
    if stock is None:  # vLLM 0.33 marks a draft model's layers when it loads them
        step_aside("draft_kv_group")
    elif still_has(stock, FAULT, "draft_kv_group"):
        wrap(kv_cache_utils, "_uses_trailing_mtp_layers", _eagle_too)


def _eagle_too(stock):
    def _uses_trailing_mtp_layers(vllm_config) -> bool:
        speculative, model = vllm_config.speculative_config, vllm_config.model_config
        eagle = speculative is not None and speculative.method in ("eagle", "eagle3")
        return stock(vllm_config) or (eagle and model is not None and model.is_hybrid)

    return _uses_trailing_mtp_layers
