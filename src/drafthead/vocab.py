"""Which target ids the head may draft: counted in what the target wrote.

Each row of the head's LM head is read at every draft step, so a head drafts only the tokens that
its target really uses. What is left out can never be drafted: `coverage` says how much that is.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from drafthead.data.answers import read_answers
from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir, write_json
from drafthead.progress import waiting
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.targets import recipe_target

CURVE = (500, 1000, 2000, 4000, 8000, 12000, 16000, 24000, 32000, 48000, 64000, 96000, 128000)


def count_tokens(written: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """How often each id occurs: int64 [V]. `written`: arrays of ids that the target generated."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids in written:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise DraftheadError(
                f"answers hold token ids {int(ids.min())}..{int(ids.max())}, the target's "
                f"vocabulary has {vocab_size}: they were written by another target"
            )
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def check_size(size: int, vocab_size: int) -> None:
    """Refuse a draft vocabulary of `size` tokens that is larger than the target's.

    Raises:
        DraftheadError: it is.
    """
    if size > vocab_size:
        raise DraftheadError(
            f"recipe: vocab.size is {size}, the target's vocabulary has only {vocab_size} tokens; "
            f"ask for at most {vocab_size}"
        )


def choose(counts: np.ndarray, size: int, always: Iterable[int]) -> np.ndarray:
    """The draft vocabulary: target ids int64 [size], ascending.

    The ids in `always` come first, then the most frequent; equal counts go by the lower id, so
    the same counts always give the same vocabulary. Raises `DraftheadError` if `size` is larger
    than the target's vocabulary or has no room for `always`.
    """
    vocab_size = len(counts)
    forced = sorted({i for i in always if 0 <= i < vocab_size})
    check_size(size, vocab_size)
    if size < len(forced):
        raise DraftheadError(
            f"recipe: vocab.size is {size}, but the target has {len(forced)} special and end "
            "tokens that are always in; ask for more"
        )
    rank = counts.astype(np.int64, copy=True)
    rank[forced] = np.iinfo(np.int64).max
    order = np.argsort(-rank, kind="stable")  # stable: ties by ascending id
    return np.sort(order[:size]).astype(np.int64)


def coverage(counts: np.ndarray, chosen: np.ndarray) -> float:
    """Share of the counted tokens that the vocabulary `chosen` holds."""
    return float(counts[chosen].sum() / max(1, counts.sum()))


def coverage_curve(counts: np.ndarray, always: Iterable[int], size: int) -> list[dict[str, Any]]:
    """Coverage at a row of sizes, `size` and the whole vocabulary among them."""
    forced = list(always)
    sizes = sorted({s for s in (*CURVE, size) if len(set(forced)) <= s < len(counts)})
    curve = [{"size": s, "coverage": coverage(counts, choose(counts, s, forced))} for s in sizes]
    return [*curve, {"size": len(counts), "coverage": 1.0}]


def offsets(chosen: np.ndarray) -> Tensor:
    """Ascending target ids [Vd] -> `d2t` int64 [Vd]: target id = draft id + d2t[draft id]."""
    return torch.from_numpy(chosen - np.arange(len(chosen), dtype=np.int64))


def always_in(tokenizer: Any, eos_token_ids: Iterable[int]) -> set[int]:
    """The tokenizer's special tokens and the target's end tokens."""
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special}
    return special | set(tokenizer.all_special_ids) | set(eos_token_ids)


def save_vocab(
    folder: Path,
    counts: np.ndarray,
    size: int,
    always: Iterable[int],
    heldout: np.ndarray | None = None,
) -> dict:
    """Choose and write `vocab.safetensors` and `coverage.json`; returns what the latter says.

    counts, heldout int64 [V]: the second is not counted, only its coverage is told.
    """
    forced = set(always)
    chosen = choose(counts, size, forced)
    t2d = torch.zeros(len(counts), dtype=torch.bool)
    t2d[torch.from_numpy(chosen)] = True
    about = {
        "size": size,
        "vocab_size": len(counts),
        "tokens": int(counts.sum()),
        "distinct": int((counts > 0).sum()),
        "coverage": coverage(counts, chosen),
        "heldout_coverage": None if heldout is None else coverage(heldout, chosen),
        "always_in": sorted(forced),
        "curve": coverage_curve(counts, forced, size),
    }
    tensors = {"d2t": offsets(chosen), "t2d": t2d, "counts": torch.from_numpy(counts)}
    with atomic_dir(folder) as temporary:
        save_file(tensors, temporary / "vocab.safetensors")
        write_json(temporary / "coverage.json", about)
    return about


def vocab(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Stage: choose the draft vocabulary from the training answers in `run.answers`.

    Writes `run.vocab`: `vocab.safetensors` (`d2t` int64 [Vd], `t2d` bool [V], `counts` int64 [V])
    and `coverage.json`. Returns what the latter says, without the list of forced ids.

    Raises:
        DraftheadError: no answers, or a vocabulary larger than the target's.
    """
    target = recipe_target(recipe)
    always = always_in(target.tokenizer(), target.eos_token_ids)
    with waiting(console, "counting tokens", unit="answers") as work:
        counts, heldout = (
            count_tokens(
                (
                    answer.ids[answer.loss_mask]
                    for answer in work.each(read_answers(run.answers, split))
                ),
                target.vocab_size,
            )
            for split in ("train", "heldout")
        )
    about = save_vocab(run.vocab, counts, recipe.vocab.size, always, heldout)
    unseen = about["heldout_coverage"]
    words = f"{about['size']} of {about['vocab_size']} tokens cover "
    if unseen is not None:
        words += f"{unseen:.2%} of the held-out answers: expect that when served. They cover "
    console.print(
        f"{words}{about['coverage']:.2%} of the training answers that they were chosen from, which "
        "says little about others"
    )
    return {key: value for key, value in about.items() if key != "always_in"}
