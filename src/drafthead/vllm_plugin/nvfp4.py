"""ModelOpt NVFP4 checkpoints on the GPU: what is quantized is read from the tensors.

The configuration that does it, and why it is needed, is in `nvfp4_config.py`; it is imported only
when such a checkpoint is served, and whether vLLM does without is looked up then. The CPU has a way
of its own: `nvfp4_cpu.py`.
"""

from . import registry
from .patch import Replacement


def _told_by_tensors(stock):
    def _get_quantization_config(model_config, load_config):
        config = stock(model_config, load_config)
        if model_config.quantization == "modelopt_fp4":
            from .nvfp4_config import CheckpointNvFp4Config, vllm_reads_tensors

            if vllm_reads_tensors():
                registry.step_aside("nvfp4")
            else:
                config = CheckpointNvFp4Config.from_stock(config, model_config)
        return config

    return _get_quantization_config


REPLACEMENTS = (
    Replacement(
        "vllm.config:VllmConfig._get_quantization_config",
        "model_config load_config",
        _told_by_tensors,
    ),
)
