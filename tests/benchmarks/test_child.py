"""The process that a benchmark's engine runs in."""

import os

import pytest

from benchmarks.lib.child import Child

ECHO = """
import json, sys
from benchmarks.lib.replies import replies
out = replies()
print("words of a library")
out.write(json.dumps({"ready": json.loads(sys.argv[1])}) + "\\n")
for line in sys.stdin:
    task = json.loads(line)
    if task == "end":
        sys.exit(3)
    if task != "be silent":
        out.write(json.dumps({"done": task}) + "\\n")
"""


def test_answers_come_line_by_line_and_the_rest_goes_to_the_log(tmp_path):
    (tmp_path / "echo_child.py").write_text(ECHO)
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd(), "src"])}
    child = Child("echo", "echo_child", {"k": 3}, tmp_path / "log", paths)
    try:
        assert child.read(60) == {"ready": {"k": 3}}
        assert child.ask(["time", 1]) == {"done": ["time", 1]}
        with pytest.raises(RuntimeError, match="too slow"):
            child.ask("be silent", limit=0.1)
        with pytest.raises(RuntimeError, match="words of a library"):
            child.ask("end")
    finally:
        child.close()
