"""Shared fixtures: tiny targets, made once a session. Set before any test imports vLLM or torch."""

import os
import sys

# One engine in this process; a thread a process, since two cores run the suite.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

from tests import tiny

# The same examples in every run, however slow the machine is at the moment.
settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Files that start engines come first, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: "vllm" not in item.path.parts)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a tiny random Llama."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def lfm2_moe(tmp_path_factory):
    """Folder of a tiny random LFM2-MoE."""
    return tiny.tiny_lfm2_moe(tmp_path_factory.mktemp("lfm2_moe"))


@pytest.fixture(scope="session")
def lfm2(tmp_path_factory):
    """Folder of a tiny random dense LFM2."""
    return tiny.tiny_lfm2(tmp_path_factory.mktemp("lfm2"))


@pytest.fixture(scope="session")
def granite(tmp_path_factory):
    """Folder of a tiny random Granite: it scales embeddings and logits, and vLLM 0.32 has heads for
    it."""
    return tiny.tiny_other(tmp_path_factory.mktemp("granite"), "granite")


@pytest.fixture(autouse=True)
def gradients():
    """On in every test, whatever an engine that ran in this process before has left behind."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture
def quick_doctor(monkeypatch):
    """Doctor's process imports nothing, and finds nothing wrong."""
    imports = "print('torch ', flush=True)\ninput()\nprint('vllm', flush=True)\n"
    monkeypatch.setattr("drafthead.doctor.engine._IMPORTS", imports)
    monkeypatch.setattr("drafthead.doctor.engine._HOOK", "")


@pytest.fixture
def drafthead(monkeypatch, capsys):
    """Run a command in this process, to its exit code, stdout and stderr."""

    from drafthead import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["drafthead", *args])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
