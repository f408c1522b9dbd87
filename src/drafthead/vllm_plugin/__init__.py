"""What stock vLLM lacks for EAGLE-3: on hybrid (short-conv) targets most, on some others the hook.

vLLM calls :func:`register` in every process it starts, through the entry-point group
``vllm.general_plugins``. Each mend is a module here with an ``apply()`` that first looks whether
the installed vLLM still has the fault. ``docs/upstream/`` has a page for each fault.

``DRAFTHEAD_SKIP_MENDS=name,name`` (names as in ``MENDS``, or ``all``) leaves mends out, to see a
fault again or to find out which mend is to blame.
"""

import importlib
import os

SUPPORTED_VLLM = "0.32."

# Applied at once: they concern the scheduler and the KV cache planner, which run in processes
# that may never import the model. They act on hybrid models, on NVFP4 checkpoints, and on the CPU.
# The first registers classes, which vLLM imports if it serves such a model; the second acts where a
# target's states are handed out.
MENDS = (
    "any_target",
    "aux_copies",
    "placeholder_drafts",
    "draft_kv_group",
    "cpu_kernel_registry",
    "cpu_expand",
    "nvfp4",
    "nvfp4_cpu",
)
# Applied when an LFM2 class is imported (lfm2.py), so that no other model sees them.
MODEL_MENDS = (
    "state_shape",
    "accepted_counts",
    "batch_order",
    "prefill_graphs",
    "resumed_prefills",
    "cpu_rope",
    "cpu_short_conv",
    "cpu_state_copies",
)

# Applied with the model's: answers stay the same, steps cost less.
COST_MENDS = ("conv_metadata", "greedy_verify")

# Applied when a head's class is imported (eagle3.py), whatever its target: likewise.
HEAD_MENDS = ("aux_norm", "draft_argmax", "greedy_verify")


def is_supported() -> bool:
    """Whether the mends were written for the installed vLLM."""
    import vllm

    return vllm.__version__.startswith(SUPPORTED_VLLM)


def skipped(name: str) -> bool:
    """Whether the mend ``name`` is left out."""
    skip = os.environ.get("DRAFTHEAD_SKIP_MENDS", "").split(",")
    return name in skip or "all" in skip


def apply(names: tuple[str, ...]) -> None:
    """Apply the mends ``names`` (modules of this package); a second call changes nothing.

    Under a vLLM that they were not written for, a mend whose place in it is gone is left out with
    a warning; it must not keep vLLM from starting.
    """
    from .patch import log

    wanted = [name for name in names if not skipped(name)]
    # Those that are not needed here say so themselves, or are for the CPU or the GPU only.
    log.info_once(
        "drafthead: mends: %s; left out: %s",
        ", ".join(wanted) or "none",
        ", ".join(name for name in names if skipped(name)) or "none",
    )
    for name in wanted:
        try:
            importlib.import_module(f"{__name__}.{name}").apply()
        except (ImportError, AttributeError) as error:
            if is_supported():
                raise
            log.warning_once("drafthead: the mend %r does not fit this vLLM: %s", name, error)


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; may be called more than once."""
    import vllm
    from vllm import ModelRegistry

    from .patch import log

    if not is_supported():
        log.warning_once(
            "drafthead's mends were written for vLLM %sx; this is %s. Each still looks whether "
            "it is needed, but check losslessness (drafthead verify) before you trust them.",
            SUPPORTED_VLLM,
            vllm.__version__,
        )
    if not skipped("aux_states"):
        for architecture in ("Lfm2ForCausalLM", "Lfm2MoeForCausalLM"):
            ModelRegistry.register_model(architecture, f"{__name__}.lfm2:{architecture}")
    head = "Eagle3LlamaForCausalLM"
    for architecture in (head, "LlamaForCausalLMEagle3"):
        stock = ModelRegistry.models.get(architecture)
        if getattr(stock, "module_name", "").endswith(".llama_eagle3"):
            ModelRegistry.register_model(architecture, f"{__name__}.eagle3:{head}")
    apply(MENDS)
