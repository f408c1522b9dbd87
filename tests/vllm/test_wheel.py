"""The patches against the Python files of vLLM 0.33's wheel, which has no build for the CPU yet."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from drafthead.fsio import atomic_dir
from drafthead.vllm_plugin import registry
from tests.vllm.places import Source

VERSION = "0.33.0"
WHEEL = (
    *("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"vllm=={VERSION}"),
    *("--platform", "manylinux_2_28_x86_64"),
)
# Both devices in one process: importing vLLM takes most of the time.
LOOK = """
import json
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
from drafthead.vllm_plugin import registry
assert vllm.__version__ == "0.33.0", vllm.__file__
print()
for device in ("gpu", "cpu"):
    if device == "cpu":
        vllm.platforms._current_platform = CpuPlatform()
    for patch in registry.TABLE:
        status = registry.look(patch)
        print(json.dumps([device, patch.name, status.state, status.why]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel's Python files: downloaded once, kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "drafthead-tests" / f"vllm-{VERSION}"
    if not folder.exists():
        downloads = tmp_path_factory.mktemp("wheel")
        done = subprocess.run(
            [sys.executable, "-m", *WHEEL, "--dest", downloads], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"pip cannot download vLLM {VERSION}: {done.stderr.strip()[-300:]}")
        (file,) = downloads.iterdir()
        with atomic_dir(folder) as partial, zipfile.ZipFile(file) as members:
            members.extractall(partial, [m for m in members.namelist() if m.endswith(".py")])
        file.unlink()
    return folder


def test_recorded_places_are_the_wheels(wheel):
    source = Source(wheel)
    recorded = json.loads(Path(__file__).with_name(f"places-{VERSION[:-2]}.json").read_text())
    found = {place: source.function(place) for place in recorded}
    assert recorded == {place: found[place] and list(found[place]) for place in recorded}


def test_every_patch_finds_its_place_and_can_try_its_fault(wheel):
    path = os.pathsep.join([str(wheel), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=os.environ | {"PYTHONPATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"[")]
    states = {(device, name): (state, why) for device, name, state, why in lines}
    for row in registry.TABLE:
        for device in ("gpu", "cpu"):
            state, why = states[device, row.name]
            if row.device not in ("any", device):
                assert state == registry.State.elsewhere
            elif row.name == "draft_kv_group":  # 0.33 marks a draft model's layers itself
                assert state == registry.State.stepped_aside
            elif row.name == "aux_norm":  # without Triton its kernel is not used
                assert state in (registry.State.needed, registry.State.stepped_aside)
            else:
                assert (state, why) == (registry.State.needed, ""), row.name
