"""What errors are held to: their type, and what they name; their sentences are free to change."""

import contextlib
import re

import pytest

from drafthead.errors import DraftheadError


@contextlib.contextmanager
def refused(*names, error=DraftheadError, field=None):
    """The block raises ``error``, which names each of ``names`` (files, fields, values) and, if one
    is given, has this ``field``."""
    with pytest.raises(error) as caught:
        yield caught
    said = str(caught.value)
    for name in map(str, names):
        start = r"(?<!\w)" if re.match(r"\w", name) else ""
        end = r"(?!\w)" if re.search(r"\w$", name) else ""
        assert re.search(start + re.escape(name) + end, said), f"{name!r} is not in: {said}"
    if field is not None:
        assert caught.value.field == field
