"""vLLM's EAGLE-3 head as it is; with its import come the patches that concern every such head.

Registered in place of vLLM's own, so that only processes that load a head see them.
"""

from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM as Eagle3LlamaForCausalLM

from . import registry

registry.apply(registry.rows("eagle3"))
