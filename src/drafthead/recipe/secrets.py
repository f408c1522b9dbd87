"""Keep secrets and local paths out of a run's records."""

import os
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
# A path that is absolute, of somebody's home or above this folder, alone or in a text (a command, a
# dumped recipe). Not what follows a scheme (`s3://…`) or a word (`tokens/s`), and not `/` alone.
_PATH = re.compile(
    r"""(?P<quote>["'])(?P<quoted>(?:/|~/|\.\./)[^"']+)(?P=quote)"""
    r"""|(?<![\w./:~-])(?P<bare>(?:/|~[\w-]*/|\.\./)[^\s"'`,;:(){}\[\]|]+)"""
)


def without_paths(value: Any) -> Any:
    """``value``, JSON-able, with the last name of each local path in place of the path: whoever
    reads it has another disk, and need not know whose this one is. Relative paths stay."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~/", "../")) and "\n" not in value:  # all of it, spaces too
        return _name(value)
    return _PATH.sub(
        lambda found: (
            f"{found['quote']}{_name(found['quoted'])}{found['quote']}"
            if found["quoted"]
            else _name(found["bare"])
        ),
        value,
    )


def _name(path: str) -> str:
    return os.path.basename(os.path.normpath(path)) or path


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
