"""Benchmarks are run seldom: every name that one takes from the package, late or early, exists."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

FILES = sorted([*Path("benchmarks").rglob("*.py"), *Path("recipes").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_of_the_package_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drafthead"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                submodule = f"{node.module}.{name}"
                assert hasattr(module, name) or importlib.util.find_spec(submodule), submodule
