"""What doctor says: one thing looked at, how it is, and the mend."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    state: str
    """``ok``, ``warning`` (works, but look) or ``fault``."""
    found: str
    mend: str = ""
    """What to do; empty when nothing is to be done."""
