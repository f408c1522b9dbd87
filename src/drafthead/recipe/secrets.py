"""What must not be read by others in what a run writes down."""

import re
from typing import Any

HIDDEN = "(not shown)"

# By the end of its key: `hf_token`, `api_key`, `s3_secret_access_key`, `password`.
_KEY = re.compile(
    "(token|secret|password|passwd|passphrase|credentials?|authorization"
    "|(api|access|secret|private|account|signing|encryption)[_-]?key)$",
    re.IGNORECASE,
)
# These are of a tokenizer's, and change what is written.
_SPECIAL = re.compile(
    "(bos|eos|pad|unk|sep|cls|mask|image|video|audio|stop|start|end)_token$", re.IGNORECASE
)
# By itself: who logs in, in an address; a token of the hub's.
_TEXT = re.compile(r"(?<=://)[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{30,}\b")


def without_secrets(value: Any) -> Any:
    """``value``, JSON-able, with :data:`HIDDEN` for each token, key or password in it, which are
    known by their keys and by their form. ``hf_token: true`` is none."""
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if isinstance(inner, str | list)
            and _KEY.search(str(key))
            and not _SPECIAL.search(str(key))
            else without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    return _TEXT.sub(HIDDEN, value) if isinstance(value, str) else value
