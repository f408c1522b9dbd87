"""Who hands out a target's hidden states: vLLM, the plugin, or nobody."""

import re
import subprocess
import sys

from drafthead.errors import DraftheadError
from drafthead.finding import Finding
from drafthead.recipe import Recipe

# Who brings EAGLE-3's auxiliary hidden states: the package of the class that would be served.
_HOOK = """
import sys
from vllm import ModelRegistry
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.plugins import load_general_plugins
load_general_plugins()
model = ModelRegistry.models[sys.argv[1]].load_model_cls()
print("hook", model.__module__.split(".")[0] if supports_eagle3(model) else "nobody")
"""


IMPORT_SECONDS = 1200
"""Seconds that importing vLLM may take: a minute on two cores, many times that on busy ones."""


def check_hook(recipe: Recipe) -> list[Finding]:
    """Whether vLLM can hand out the target's hidden states, which capture and every head need.

    In a process of its own, which loads the plugin. Nothing is said of an architecture that vLLM
    does not list: vLLM says itself what it makes of it.
    """
    from drafthead.targets import recipe_target  # PyTorch, which doctor does without

    try:
        (architecture,) = recipe_target(recipe).architectures
        done = subprocess.run(
            [sys.executable, "-c", _HOOK, architecture],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
        )
    except (DraftheadError, ValueError, subprocess.TimeoutExpired):
        return []
    found = re.search(r"^hook (\w+)$", done.stdout, re.MULTILINE)
    if found is None:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if not last.startswith(("ModuleNotFoundError", "ImportError")):
            return []
        return [
            Finding(
                "hidden states",
                "fault",
                f"vLLM's {architecture} cannot be imported: {last}",
                "install what is missing; torchvision's CPU build is in an index of PyTorch's own",
            )
        ]
    bringer = {"vllm": "vLLM itself", "drafthead": "drafthead's plugin"}.get(found[1])
    if bringer:
        return [Finding("hidden states", "ok", f"{architecture}'s are handed out by {bringer}")]
    words = f"neither vLLM's {architecture} nor drafthead's plugin hands them out: no EAGLE-3"
    mend = "engine.extra: {model_impl: transformers}, if vLLM can serve the target that way"
    return [Finding("hidden states", "fault", words, mend)]
