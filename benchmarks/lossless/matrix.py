"""Are answers with a head those of the target alone, whatever a request asks for?

    python -m benchmarks.lossless.matrix --out DIR

Tiny targets (dense, hybrid) in fp32 on the CPU, EAGLE-3 and DSpark heads that are right now and
then, drafts taken or drawn; structured output, penalties, bad words, stop tokens and strings,
log-probabilities, several answers, streaming, aborts; each on an engine as vLLM sets it and on one
with prefix caching, prompts in chunks, priorities and few blocks. Writes DIR/matrix.json.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import tests.conftest  # noqa: F401  (the environment, before vLLM reads it)
from benchmarks.lib.record import begin, save
from drafthead.fsio import read_json
from tests.vllm.engines import engine
from tests.vllm.options import ASKED, answers, hard, pair, same, speculative

K = 3


def measure(folder: Path, kind: str, drafter: str, method: str) -> dict:
    """Every way to ask, on each setting: whether answers are the target's, and the acceptance."""
    target, head = pair(folder, kind, drafter)
    with engine(target, **ASKED) as llm:
        alone = answers(llm, drafted=False)
    rows = {}
    for setting, arguments in {"defaults": {}, "hard": hard(kind, drafter)}.items():
        speculation = speculative(drafter, head, K, method)
        with engine(target, speculation, **ASKED, **arguments) as llm:
            for name, got in answers(llm, drafted=True).items():
                drafts, tokens = got["num_drafts"], got["num_draft_tokens"]
                differ = [not same(*both) for both in zip(alone[name]["answers"], got["answers"])]
                rows[f"{kind}, {drafter}, {method}, {setting}: {name}"] = {
                    "answers": len(differ),
                    "differ": sum(differ),
                    "drafts": drafts,
                    "cut": round(1 - tokens / (K * drafts), 4) if drafts else None,
                    "accepted_by_counters": round(got["num_accepted_tokens"] / tokens, 4)
                    if tokens
                    else None,
                    "tokens_a_step": round(1 + got["num_accepted_tokens"] / drafts, 4)
                    if drafts
                    else None,
                }
    return rows


def figures(rows: dict[str, dict]) -> dict[str, int]:
    """What all rows come to."""
    return {
        "rows": len(rows),
        "answers": sum(row["answers"] for row in rows.values()),
        "differ": sum(row["differ"] for row in rows.values()),
        "rows_without_an_accepted_draft": sum(
            not (row["tokens_a_step"] or 1) > 1 for row in rows.values()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="such as dense-eagle3-greedy")
    options = parser.parse_args()
    path = options.out / "matrix.json"
    rows = read_json(path, "rows of an earlier part")["rows"] if path.exists() else {}
    names = ("dense", "hybrid"), ("eagle3", "dspark"), ("greedy", "probabilistic")
    with tempfile.TemporaryDirectory() as folder:
        for kind, drafter, method in itertools.product(*names):
            there = any(name.startswith(f"{kind}, {drafter}, {method}") for name in rows)
            if options.only in f"{kind}-{drafter}-{method}" and not there:
                rows |= measure(Path(folder) / method, kind, drafter, method)
                save(path, begin("matrix") | {"rows": rows}, figures(rows))
    for name, row in rows.items():
        if row["differ"] or not (row["tokens_a_step"] or 1) > 1:
            print(name, row)
    print(figures(rows))


if __name__ == "__main__":
    main()
