"""Which modules of a ModelOpt NVFP4 checkpoint are quantized is read from its tensors.

vLLM decides by matching the checkpoint's list of excluded modules against its own module names.
That fails where the list and the names are spelt differently, and then vLLM allocates packed
weights for a plain tensor (or the reverse) and cannot load it:

- LFM2's convolutions are `conv` in the checkpoint and `short_conv` in vLLM. The rename covers
  `.conv.` inside a name, so `model.layers.0.conv*` works and `model.layers.0.conv` or `*.conv`,
  which end there, do not.
- A flat `quantization_config` is read for `ignore` only; `exclude_modules` there is passed over.
- Older ModelOpt leaves routers out of the list although it does not quantize them, and a tied
  LM head may be missing too.

The tensors cannot be misspelt: a module with a `weight_scale` is quantized, one without is not.
"""

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.transformers_utils.config import get_safetensors_params_metadata

from . import registry

log = init_logger(registry.log.name)


def vllm_reads_tensors() -> bool:
    """Whether vLLM's configuration looks at a checkpoint's tensors itself, as AWQ's and GPTQ's do
    where vLLM lets each of them adapt itself to its checkpoint."""
    stock = QuantizationConfig.maybe_update_config
    return ModelOptNvFp4Config.maybe_update_config is not stock


class CheckpointNvFp4Config(ModelOptNvFp4Config):
    """vLLM's NVFP4 configuration, told by the tensors what is quantized.

    A class of its own, not a patch of vLLM's, so that a configuration pickled for a worker process
    brings its behaviour along.
    """

    quantized: frozenset[str] = frozenset()
    """Modules with a packed weight; the checkpoint's names until `apply_vllm_mapper`."""
    plain: frozenset[str] = frozenset()
    """Modules with a matrix in floating point."""

    @classmethod
    def from_stock(cls, config: ModelOptNvFp4Config, model_config: Any) -> ModelOptNvFp4Config:
        """vLLM's `config` with the tensor names of its checkpoint; as it is where none are found
        (dummy weights, formats other than safetensors)."""
        tensors = get_safetensors_params_metadata(
            model_config.model, revision=model_config.revision
        )
        if type(config) is not ModelOptNvFp4Config or not tensors:
            return config
        config.__class__ = cls
        weights = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
        config.quantized = frozenset(m for m in weights if f"{m}.weight_scale" in tensors)
        # norms have vectors; only matrices are ever in question
        config.plain = frozenset(
            m for m in weights - config.quantized if len(tensors[f"{m}.weight"]["shape"]) > 1
        )
        return config

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.quantized = frozenset(hf_to_vllm_mapper.apply_list(list(self.quantized)))
        self.plain = frozenset(hf_to_vllm_mapper.apply_list(list(self.plain)))

    def is_layer_excluded(self, prefix: str) -> bool:
        """Whether the module `prefix` of vLLM's (fused modules included) is left unquantized.

        Raises:
            ValueError: vLLM fuses modules here of which only some are quantized.
        """
        stock = super().is_layer_excluded(prefix)
        parent, _, last = prefix.rpartition(".")
        parts = [
            f"{parent}.{p}" if parent else p for p in self.packed_modules_mapping.get(last, [])
        ]
        names = [prefix, *parts]
        within = f"{prefix}."  # the experts of a fused MoE layer

        def among(modules: frozenset[str]) -> bool:
            return any(n in modules for n in names) or any(m.startswith(within) for m in modules)

        quantized, plain = among(self.quantized), among(self.plain)
        if quantized and plain:
            raise ValueError(
                f"{prefix}: the checkpoint quantizes some of the modules that vLLM fuses here and "
                "not others; quantize all of them or none"
            )
        if quantized or plain:
            excluded = plain
        elif last == "lm_head" and self.plain:
            excluded = True  # tied: its rows are the embedding's, which no checkpoint packs
        else:
            return stock
        if excluded != stock:
            log.info_once(
                "drafthead: the list of excluded modules says otherwise, but the tensors of %s "
                "are %s; served so.",
                prefix,
                "not quantized" if excluded else "quantized",
            )
        return excluded
