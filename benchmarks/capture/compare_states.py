"""How far two captures of the same tokens are from each other: by decoding or prefill, in bf16 or
fp8, from one engine or another.

    python -m benchmarks.capture.compare_states runs/a/states runs/b/states --target MODEL
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drafthead.capture.checks import teacher_argmax
from drafthead.errors import DraftheadError
from drafthead.states import Sample, StateReader
from drafthead.targets import Target, load_target

_BATCH_ROWS = 4096


def compare(pairs: Iterable[tuple[Sample, Sample]], target: Target) -> dict[str, Any]:
    """Hold pairs of samples of the same tokens together, over the positions that predict a token
    of the answer.

    Args:
        pairs: the reference first.
        target: whose final norm and LM head are the teacher.

    Returns:
        ``positions``; ``teacher_differs``, the share of them at which the teacher's argmax is
        another; ``served``: for each side the share at which it is the token that the target
        wrote; ``distance``: for each layer, in the order of the store, the median and the 99th
        percentile over positions of |b - a| / |a| (2-norms over the hidden size).

    Raises:
        DraftheadError: a pair is of different tokens, or there is no pair.
    """
    norm, eps = target.final_norm()
    lm_head = target.lm_head()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[torch.Tensor] = []  # last-layer states of both sides, waiting for the teacher
    tokens: list[torch.Tensor] = []
    distances: list[torch.Tensor] = []
    found = torch.zeros(4, dtype=torch.int64)  # positions, differs, served by a, by b

    def settle() -> None:
        states, served = torch.cat(rows, dim=1).to(device), torch.cat(tokens)
        a, b = (teacher_argmax(side, norm, eps, lm_head, target.logits).cpu() for side in states)
        counts = [len(served), (a != b).sum(), (a == served).sum(), (b == served).sum()]
        found.add_(torch.tensor([int(count) for count in counts]))
        rows.clear()
        tokens.clear()

    for a, b in pairs:
        if not torch.equal(a.ids, b.ids) or a.aux.shape != b.aux.shape:
            raise DraftheadError(
                f"{a.conversation} and {b.conversation}: not the same tokens and layers, so there "
                "is nothing to compare"
            )
        at = slice(a.prompt_len - 1, min(len(a.states), len(a.ids) - 1))
        wide = [torch.cat([s.aux, s.last[:, None]], dim=1)[at].float() for s in (a, b)]
        distances.append((wide[1] - wide[0]).norm(dim=-1) / wide[0].norm(dim=-1))
        rows.append(torch.stack([side[:, -1] for side in wide]))
        tokens.append(a.ids[at.start + 1 : at.stop + 1].long())
        if sum(len(t) for t in tokens) >= _BATCH_ROWS:
            settle()
    if tokens:
        settle()
    if not distances:
        raise DraftheadError("no samples to compare")
    positions, differs, *served = found.tolist()
    return {
        "positions": positions,
        "teacher_differs": differs / positions,
        "served": [count / positions for count in served],
        "distance": _spread(torch.cat(distances)),
    }


def _spread(distances: torch.Tensor) -> list[dict[str, float]]:
    """Median and 99th percentile of each column of [positions, layers]. NumPy's: PyTorch's take no
    more than 16 million numbers."""
    median, p99 = np.quantile(distances.double().numpy(), (0.5, 0.99), axis=0)
    return [{"median": float(m), "p99": float(p)} for m, p in zip(median, p99, strict=True)]


def compare_stores(first: Path, second: Path, target: Target) -> dict[str, Any]:
    """``compare`` over the conversations that two stores share, paired by name, and under
    ``other_answers`` how many of them are left out: on a GPU an answer may part at a near-tie, and
    then its states are of other tokens.

    Raises:
        DraftheadError: they share none, one is broken, or neither is of this target.
    """
    readers = [StateReader(path, partial=True) for path in (first, second)]
    captured = {reader.meta.inputs.get("target") for reader in readers}
    if None not in captured and target.fingerprint not in captured:
        raise DraftheadError(
            f"{target.path}: the states in {first} and {second} are of another target; give "
            "--target the folder that they were captured from"
        )
    places = {name: i for i, name in enumerate(readers[1].conversation)}
    shared = [(i, places[name]) for i, name in enumerate(readers[0].conversation) if name in places]
    alike: list[bool] = []

    def pairs() -> Iterator[tuple[Sample, Sample]]:
        for i, j in shared:
            a, b = readers[0][i], readers[1][j]
            alike.append(torch.equal(a.ids, b.ids))
            if alike[-1]:
                yield a, b

    found = compare(pairs(), target)
    return {"conversations": sum(alike), "other_answers": alike.count(False), **found}


def describe(found: dict[str, Any]) -> str:
    """``compare_stores``'s figures in words."""
    served = " and ".join(f"{share:.2%}" for share in found["served"])
    layers = ", ".join(f"{d['median']:.2%} (p99 {d['p99']:.2%})" for d in found["distance"])
    other = found["other_answers"]
    return (
        f"{found['positions']} positions: the teacher's argmax differs at "
        f"{found['teacher_differs']:.3%} of them; it is the served token at {served}\n"
        f"relative distance of the states, layer by layer: {layers}"
        + (f"\nleft out: {other} conversations whose answers differ" if other else "")
    )


def main(args: Sequence[str] | None = None) -> None:
    """Compare two stores: words on stderr, one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="folder of states, the reference")
    parser.add_argument("second", type=Path, help="folder of states of the same tokens")
    parser.add_argument("--target", required=True, help="target whose states they are")
    parser.add_argument("--trust-remote-code", action="store_true")
    given = parser.parse_args(args)
    target = load_target(given.target, trust_remote_code=given.trust_remote_code)
    found = compare_stores(given.first, given.second, target)
    print(describe(found), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
