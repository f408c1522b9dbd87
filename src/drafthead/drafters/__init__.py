"""Draft heads by kind: what each is, how it is trained, drafts and is stored, a folder each.

`base.py` has what all must do. A new kind is a folder and a line in `DRAFTERS`.
"""

from pathlib import Path
from typing import Any

from drafthead.drafters.base import Drafter
from drafthead.drafters.dspark.drafter import DSpark
from drafthead.drafters.eagle3.drafter import Eagle3
from drafthead.errors import DraftheadError, UnsupportedHead
from drafthead.fsio import read_json
from drafthead.head.formats import OTHER_ARCHITECTURES

DRAFTERS: dict[str, Drafter] = {drafter.kind: drafter for drafter in (Eagle3(), DSpark())}


def drafter_of(folder: Path) -> Drafter:
    """The kind of the head in a folder, by its `config.json`.

    Raises:
        UnsupportedHead: it is of a kind that only vLLM knows.
        DraftheadError: there is none, or it is of no kind that is known.
    """
    if not folder.is_dir():
        raise DraftheadError(f"{folder}: no such head; a head is a folder with config.json")
    path = folder / "config.json"
    raw: Any = read_json(path, "a head's configuration")
    for drafter in DRAFTERS.values():
        if isinstance(raw, dict) and drafter.matches(raw):
            return drafter
    names = raw.get("architectures") if isinstance(raw, dict) else None
    if isinstance(names, list) and names and names[0] in [*OTHER_ARCHITECTURES]:
        raise UnsupportedHead(f"{path}: a head of the kind {OTHER_ARCHITECTURES[names[0]]}")
    raise DraftheadError(
        f"{path}: architectures {names!r:.80} is no kind of draft head that is known "
        f"({', '.join(DRAFTERS)})",
        field="architectures",
    )


__all__ = ["DRAFTERS", "Drafter", "drafter_of"]
