"""NVFP4 checkpoints on the CPU: weights are expanded while they are loaded.

vLLM has no NVFP4 kernel for the CPU and refuses such checkpoints. Here the model is built as if
the checkpoint were dense, and the loader is handed dense tensors, each expanded from its packed
weight and scales: the values of the format's definition, rounded once to the model's type.
Activations are not quantized, as with Marlin's kernels on Hopper. It takes the memory of the dense
model: meant for rehearsing a job, not for serving it.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from vllm.logger import init_logger
from vllm.platforms import PlatformEnum

from . import registry
from .patch import Replacement

log = init_logger(registry.log.name)

QUANTIZATION = "modelopt_fp4"
_PARTS = ("weight", "weight_scale", "weight_scale_2")
_UNUSED = ("input_scale", "k_scale", "v_scale")


@functools.cache
def is_needed() -> bool:
    """Whether vLLM lacks NVFP4 kernels for the CPU: for linear layers, or for experts.

    Looked up when such a checkpoint is served: vLLM's kernels are long to import.
    """
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as experts

    kernels = getattr(linear, "_POSSIBLE_NVFP4_KERNELS", {})
    if kernels.get(PlatformEnum.CPU) and any(
        kernel._supports_current_device()
        for backend in experts.NvFp4MoeBackend
        for kernel in experts.backend_to_kernel_cls(backend)
    ):
        registry.step_aside("nvfp4_cpu")
        return False
    return True


def _none_for_nvfp4(stock):
    def _get_quantization_config(model_config, load_config):
        if model_config.quantization != QUANTIZATION or not is_needed():
            return stock(model_config, load_config)
        log.info_once(
            "drafthead: no NVFP4 kernel on the CPU; %s is served with its weights expanded to %s.",
            model_config.model,
            model_config.dtype,
        )
        return None

    return _get_quantization_config


def _expanded(stock):
    def get_all_weights(self, model_config, model):
        weights = stock(self, model_config, model)
        expanded = model_config.quantization == QUANTIZATION and is_needed()
        return expand(weights) if expanded else weights

    return get_all_weights


def expand(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Replace each packed weight and its scales by the fp32 weight [N, K]; pass the rest on.

    The three parts of a weight may come in any order and from different files.

    Raises:
        ValueError: a packed weight without its scales.
    """
    from drafthead.targets.nvfp4 import dequantize

    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        if part in _UNUSED:
            continue
        if part not in _PARTS or (part == "weight" and tensor.dtype != torch.uint8):
            yield name, tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[part] = tensor
        if len(parts) == len(_PARTS):
            del waiting[module]
            yield f"{module}.weight", dequantize(*(parts[p] for p in _PARTS))
    if waiting:
        module, parts = next(iter(waiting.items()))
        missing = ", ".join(p for p in _PARTS if p not in parts)
        raise ValueError(f"{module}: not a whole NVFP4 weight, {missing} missing")


REPLACEMENTS = (
    Replacement(
        "vllm.config:VllmConfig._get_quantization_config",
        "model_config load_config",
        _none_for_nvfp4,
    ),
    Replacement(
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights",
        "self model_config model",
        _expanded,
    ),
)
