"""The KV cache group of a head on a hybrid target is found.

The planner locates a draft model's layers by position (they register after the target's) for MTP
only. For other heads it finds none on a hybrid target, warns, and then treats every group, the
target's states included, as the draft's.
"""

from dataclasses import fields
from types import SimpleNamespace

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheSpec

from .patch import Replacement, original


def needed() -> bool | None:
    """Whether a head's layers on a hybrid target are not looked for."""
    if not hasattr(kv_cache_utils, "_uses_trailing_mtp_layers"):
        # vLLM 0.33 marks a draft model's layers when it loads them.
        return False if "is_draft" in {field.name for field in fields(KVCacheSpec)} else None
    speculative = SimpleNamespace(method="eagle3", use_eagle=lambda: True)
    model = SimpleNamespace(is_hybrid=True, hf_config=SimpleNamespace(model_type="lfm2_moe"))
    config = SimpleNamespace(speculative_config=speculative, model_config=model)
    return not original(kv_cache_utils, "_uses_trailing_mtp_layers")(config)


def _heads_too(stock):
    def _uses_trailing_mtp_layers(vllm_config) -> bool:
        speculative, model = vllm_config.speculative_config, vllm_config.model_config
        head = speculative is not None and speculative.use_eagle()
        return stock(vllm_config) or (head and model is not None and model.is_hybrid)

    return _uses_trailing_mtp_layers


REPLACEMENTS = (
    Replacement("vllm.v1.core.kv_cache_utils:_uses_trailing_mtp_layers", "vllm_config", _heads_too),
)
