"""The Triton kernels without a GPU."""

import subprocess
import sys

from tests.triton_interpreter import REPO, environment


def test_kernels_under_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", f"--basetemp={tmp_path / 'kernels'}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "tests/train/test_kernels.py"],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout, done.stdout[-500:]
    assert "skipped" not in done.stdout, done.stdout[-500:]
