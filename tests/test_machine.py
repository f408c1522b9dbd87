"""What the machine is: GPUs from an NVML that only says what it is told, a container's limits."""

import email.message
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from drafthead import machine
from drafthead.machine import Gpu, Machine

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
    gpus, nvlink, driver = machine._gpus()
    assert gpus == tuple(Gpu("a card", size) for size in memory)
    assert nvlink is (True if len(memory) > 1 else None)
    assert driver == "570.1"


def test_a_gpu_that_shares_the_machines_memory(monkeypatch):
    """DGX Spark: NVML tells its name and not its memory."""

    def not_told(handle):
        raise NotSupported

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetMemoryInfo", not_told)
    gpus, _, _ = machine._gpus()
    assert gpus == (Gpu("a card", psutil.virtual_memory().total),) * len(UUIDS)


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [
        ({}, None, None),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ({"cpu.max": "150000 100000", "memory.max": "1048576"}, 1.5, 1 << 20),
        (
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
            None,
        ),
        (
            {
                "cpu/cpu.cfs_quota_us": "200000",
                "cpu/cpu.cfs_period_us": "50000",
                "memory/memory.limit_in_bytes": "1048576",
            },
            4,
            1 << 20,
        ),
    ],
)
def test_a_containers_limits(tmp_path, files, quota, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine._container(64, 1 << 38, tmp_path) == (quota, limit)
    assert machine._container(1, 1 << 19, tmp_path) == (None, None)  # of no effect there


@pytest.mark.parametrize(("quota", "usable"), [(None, 64), (2.5, 2), (0.5, 1)])
def test_threads_are_counted_by_what_the_container_gives(monkeypatch, quota, usable):
    monkeypatch.setattr(machine, "_visible_cores", lambda: 64)
    monkeypatch.setattr(machine, "_container", lambda cores, memory: (quota, None))
    assert machine.usable_cores() == usable


def test_the_machine_is_described_with_its_containers_limits():
    whole = Machine("Linux", "a processor", 64, 256 << 30, (), True, None, {})
    assert "a processor, 64 cores, 256 GiB;" in str(whole)
    small = replace(whole, cpu_quota=1.5, memory_limit_bytes=8 << 30)
    assert "a processor, 64 cores (quota 1.5), 256 GiB (limit 8);" in small.as_dict()["summary"]


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///src/my%20drafthead", "dir_info": {}}, "'/src/my drafthead[ray]'"),
        (
            {"url": "https://a.example/d", "vcs_info": {}},
            "'drafthead[ray] @ git+https://a.example/d'",
        ),
        ({}, "'.[ray]' in a clone"),
    ],
)
def test_drafthead_is_installed_from_where_it_came(monkeypatch, origin, command):
    monkeypatch.setattr(machine, "_installed_from", lambda: origin)
    monkeypatch.setattr(machine.importlib.metadata, "metadata", lambda _: email.message.Message())
    assert machine.install_command("ray").startswith(f"pip install {command}")
