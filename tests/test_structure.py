"""Data flows one way: a room imports from those before it, never from those after."""

import ast
from pathlib import Path

import pytest

import drafthead

SOURCE = Path(drafthead.__file__).parent
ORDER = (
    *("errors", "progress", "machine", "finding", "fsio", "process", "recipe", "rundir"),
    *("targets", "data", "ops", "states", "head", "drafters", "kinds", "plan", "serve", "vocab"),
    *("init", "quantize", "capture"),
    *("train", "prove"),
    *("report", "run", "doctor"),
    *("cli_options", "cli_prove", "cli", "__main__"),
)
"""The rooms and files of the package in the way of the data. `vllm_plugin` stands aside: it runs
inside vLLM's processes and knows nothing of the rest but the reading of NVFP4."""
PLUGIN = "vllm_plugin"


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path):
    """The rooms that a file imports from, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *inner = name.split(".")
            if package == "drafthead" and inner and inner[0] in (*ORDER, PLUGIN):
                yield inner[0]


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def test_every_room_has_its_place():
    assert {room(path) for path in FILES} == {*ORDER, PLUGIN}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_against_the_way_of_the_data(path):
    here = room(path)
    for other in imported(path):
        if here == PLUGIN:
            assert other in (PLUGIN, "targets"), f"the plugin must not import {other}"
        elif other != PLUGIN:
            assert ORDER.index(other) <= ORDER.index(here), f"{here} imports {other}, after it"
