"""The Triton kernels without a GPU."""

from tests.triton_interpreter import run_tests


def test_kernels_under_the_interpreter(tmp_path):
    run_tests(f"--basetemp={tmp_path / 'kernels'}", "tests/ops/test_kernels.py")
