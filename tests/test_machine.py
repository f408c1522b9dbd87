"""Which GPUs this process may use, from an NVML that only says what it is told."""

import sys
from types import SimpleNamespace

import psutil
import pytest

from drafthead import machine
from drafthead.machine import Gpu

UUIDS = ["GPU-8932f937-d72c", "GPU-8932aaaa-0000", "GPU-1f22a253-c329"]
SLICE = "MIG-5a1b"


class Refused(Exception):
    pass


class NotSupported(Refused):
    pass


def by_uuid(name):
    if name != SLICE:
        raise Refused
    return SLICE


@pytest.fixture(autouse=True)
def nvml(monkeypatch):
    sizes = dict(zip([*UUIDS, SLICE], (10, 11, 12, 3), strict=True))
    stub = SimpleNamespace(
        NVMLError=Refused,
        NVMLError_NotSupported=NotSupported,
        NVML_P2P_CAPS_INDEX_NVLINK=0,
        NVML_P2P_STATUS_OK=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(UUIDS),
        nvmlDeviceGetHandleByIndex=lambda i: UUIDS[i],
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetName=lambda handle: "a card",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=sizes[handle]),
        nvmlDeviceGetP2PStatus=lambda a, b, what: 0,
        nvmlSystemGetDriverVersion=lambda: "570.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", stub)


@pytest.mark.parametrize(
    ("visible", "memory"),
    [
        (None, [10, 11, 12]),
        ("", []),
        ("2, 0", [12, 10]),
        ("-1", []),
        ("0,-1,1", [10]),  # nothing after a name of nothing
        ("GPU-1f22a253-c329,0", [12, 10]),
        ("GPU-1f", [12]),
        ("GPU-8932", []),  # of two
        (SLICE, [3]),
        ("MIG-other", []),
    ],
)
def test_what_cuda_would_see(visible, memory, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus, _, driver = machine._gpus()
    assert gpus == tuple(Gpu("a card", size) for size in memory)
    assert driver == "570.1"


def test_a_gpu_that_shares_the_machines_memory(monkeypatch):
    """DGX Spark: NVML tells its name and not its memory."""

    def not_told(handle):
        raise NotSupported

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetMemoryInfo", not_told)
    gpus, _, _ = machine._gpus()
    assert gpus == (Gpu("a card", psutil.virtual_memory().total),) * len(UUIDS)
