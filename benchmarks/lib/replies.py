"""The child's side of `child.py`. It imports nothing of drafthead: an engine may run under another
version of it."""

import os
from typing import TextIO


def replies() -> TextIO:
    """The child's side: where its answers go. What else it prints goes to the log from now on."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out
