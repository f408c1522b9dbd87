"""vLLM's DSpark head as it is; with its import come the patches that concern every such head.

Registered in place of vLLM's own, so that only processes that load a head see them.
"""

from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM as Qwen3DSparkForCausalLM

from . import registry

registry.apply(registry.rows("dspark"))
