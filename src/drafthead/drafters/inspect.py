"""What a head is, whatever its kind, and what is wrong with a broken one."""

from pathlib import Path
from typing import Any

from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.errors import DraftheadError
from drafthead.targets import Target


def inspect_head(
    path: Path | str, target: Target | None = None, *, deep: bool = True
) -> dict[str, Any]:
    """Look at a head without running it; see `head.inspect.inspect_head` for what is returned. A
    folder that is of no known kind is looked at as an EAGLE-3 head, which says what is missing."""
    folder = Path(path)
    try:
        drafter = drafter_of(folder)
    except DraftheadError:
        drafter = DRAFTERS["eagle3"]
    return drafter.inspect(folder, target, deep)
