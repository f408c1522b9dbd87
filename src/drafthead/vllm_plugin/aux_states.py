"""EAGLE-3's auxiliary hidden states for LFM2 and LFM2-MoE, which lack the hook in vLLM.

The classes are in lfm2.py, which is imported only when such a model is served; whether vLLM has the
hook is asked of its class then. They are registered even if this patch is left out: their import
applies the other patches of LFM2.
"""

CLASSES = {
    "Lfm2ForCausalLM": "vllm.model_executor.models.lfm2",
    "Lfm2MoeForCausalLM": "vllm.model_executor.models.lfm2_moe",
}
"""vLLM's classes, and where they are."""


def apply() -> None:
    """Raises LookupError: vLLM has moved the classes."""
    from vllm import ModelRegistry

    for name, module in CLASSES.items():
        stock = getattr(ModelRegistry.models.get(name), "module_name", None)
        if stock == f"{__package__}.lfm2":
            continue
        if stock != module:
            raise LookupError(f"vLLM's {name} is in {stock}, not in {module}")
        ModelRegistry.register_model(name, f"{__package__}.lfm2:{name}")
