"""What stock vLLM lacks for draft heads: most on hybrid (short-conv) targets, on others the hook.

vLLM calls :func:`register` in every process it starts, through the entry-point group
``vllm.general_plugins``. Each patch is a module here; ``registry.py`` has the table of them all.
``docs/upstream/`` has a page for each fault.

``DRAFTHEAD_SKIP_PATCHES=name,name`` (or ``all``) leaves patches out, to see a fault again or to
find out which patch is to blame.
"""


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; may be called more than once."""
    from . import registry

    registry.apply(registry.rows(None))
    hook = registry.status("aux_states")
    if hook.state == registry.State.off:
        # The import of its classes applies the other patches of LFM2.
        for patch in registry.rows("lfm2"):
            registry.record(registry.Status(patch, registry.State.off, hook.why))
    try:
        _register_heads()
    except Exception as error:  # must not keep a vLLM that it does not know from starting
        registry.log.warning("drafthead's patches of heads, for speed, are off: %s", error)


# Architectures of heads: vLLM's module and its class, in the module here that stands in for it.
_HEADS = {
    "Eagle3LlamaForCausalLM": ("llama_eagle3", "eagle3:Eagle3LlamaForCausalLM"),
    "LlamaForCausalLMEagle3": ("llama_eagle3", "eagle3:Eagle3LlamaForCausalLM"),
    "Qwen3DSparkModel": ("qwen3_dspark", "dspark:Qwen3DSparkForCausalLM"),
}


def _register_heads() -> None:
    """Let the import of a head's class apply the patches of such heads."""
    from vllm import ModelRegistry

    for architecture, (module, ours) in _HEADS.items():
        stock = ModelRegistry.models.get(architecture)
        if getattr(stock, "module_name", "").endswith(f".{module}"):
            ModelRegistry.register_model(architecture, f"{__name__}.{ours}")
