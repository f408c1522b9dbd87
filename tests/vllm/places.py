"""The functions that patches replace, as another vLLM's source has them: read, never imported.

pip download --no-deps --only-binary=:all: vllm==0.33.0
unzip -q vllm-*.whl 'vllm/*.py' -d FOLDER
python -m tests.vllm.places FOLDER > tests/vllm/places-0.33.json
"""

import ast
import hashlib
import json
import sys
from pathlib import Path


class Source:
    """vLLM's Python files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def function(self, place: str) -> tuple[list[str], str] | None:
        """Parameters and fingerprint of the function at ``module:Class.name``, if it is there."""
        module, _, path = place.partition(":")
        found = self._resolve(module, path.split("."))
        if found is None:
            return None
        node, file = found
        a = node.args
        named = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs]
        parameters = [arg.arg for arg in [*named, *([a.kwarg] if a.kwarg else [])]]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        text = "\n".join(file.read_text().splitlines()[first - 1 : node.end_lineno])
        return parameters, hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]

    def _file(self, module: str) -> Path | None:
        base = self.folder.joinpath(*module.split("."))
        files = (base.with_suffix(".py"), base / "__init__.py")
        return next((file for file in files if file.is_file()), None)

    def _resolve(self, module: str, path: list[str]) -> tuple[ast.FunctionDef, Path] | None:
        """The definition of a name in a module or class; imports and base classes are followed."""
        file = self._file(module)
        if file is None:
            return None
        body = ast.parse(file.read_text()).body
        name, *rest = path
        for node in ast.walk(ast.Module(body, [])):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        package = module.split(".")
                        package = package if file.name == "__init__.py" else package[:-1]
                        above = package[: len(package) - node.level + 1] if node.level else []
                        source = ".".join([*above, *([node.module] if node.module else [])])
                        return self._resolve(source, [alias.name, *rest])
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == name and not rest:
                return node, file
            if isinstance(node, ast.ClassDef) and node.name == name and rest:
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and inner.name == rest[0]:
                        return inner, file
                for base in node.bases:
                    base = base.value if isinstance(base, ast.Subscript) else base
                    if isinstance(base, ast.Name):
                        found = self._resolve(module, [base.id, *rest])
                        if found is not None:
                            return found
        return None


def main(folder: str) -> None:
    from drafthead.vllm_plugin import registry

    source = Source(Path(folder))
    places = {r.place: source.function(r.place) for p in registry.TABLE for r in p.replacements}
    lines = (f"{json.dumps(place)}: {json.dumps(found)}" for place, found in places.items())
    print("{" + ",\n".join(lines) + "}")


if __name__ == "__main__":
    main(*sys.argv[1:])
