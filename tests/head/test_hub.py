"""Heads of the hub: fetched, looked at, and refused by name where they are pickles."""

import json
import os
import subprocess
import sys

import pytest

from tests.head.test_checkpoint import saved
from tests.report import hub


def inspect(server, tmp_path, *words):
    """`drafthead inspect --json` as its own process: the hub's library reads its settings once."""
    done = subprocess.run(
        [sys.executable, "-m", "drafthead", "inspect", *words, "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        },
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def head(tmp_path):
    return saved(tmp_path / "h")


def test_a_head_of_the_hub_is_fetched_without_the_rest(tmp_path, head):
    with hub.running() as server:
        server.served = {file.name: file.read_bytes() for file in head.iterdir()}
        server.served |= {"optimizer.pt": b"large", "README.md": b"# A head"}
        code, about = inspect(server, tmp_path, "someone/head")
        log = " ".join(server.log)
    assert (code, about["problems"]) == (0, [])
    assert about["config"]["draft_vocab_size"] == 23
    assert "config.json" in log
    assert "optimizer.pt" not in log


def test_a_pickle_of_the_hub_is_refused_by_name(tmp_path, head):
    with hub.running() as server:
        server.served = {"config.json": (head / "config.json").read_bytes()}
        server.served |= {"pytorch_model.bin": b"a pickle"}
        code, about = inspect(server, tmp_path, "someone/head")
        log = " ".join(server.log)
    assert code == 2
    assert "pytorch_model.bin" in about["error"]
    assert "resolve/" + hub.COMMIT + "/pytorch_model.bin" not in log
