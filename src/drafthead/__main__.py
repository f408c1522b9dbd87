"""``python -m drafthead`` is the command ``drafthead``."""

from drafthead.cli import main

main()
