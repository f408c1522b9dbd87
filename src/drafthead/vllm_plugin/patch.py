"""How a patch replaces functions of vLLM, and how it knows that they are still the same."""

import functools
import hashlib
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_PATCH = "_drafthead_patch"


@dataclass(frozen=True)
class Replacement:
    """One function of vLLM, and what a patch makes of it."""

    place: str
    """``module:name`` or ``module:Class.name``."""
    parameters: str
    """Names of the function's parameters: as long as vLLM has these, the replacement fits. With a
    ``*`` at the end those that it names itself; it passes the others on as they are."""
    make: Callable[[Callable], Callable]
    """Takes vLLM's function (or that of an earlier patch) and returns the new one."""
    text: str = ""
    """:func:`fingerprint` of the function, for a replacement that does all of its work by itself:
    it fits only while vLLM has not changed what the function does."""

    def owner(self) -> tuple[Any, str]:
        """The module or class that holds the function, and the function's name.

        Raises:
            ImportError, AttributeError: vLLM has moved it.
        """
        module, _, path = self.place.partition(":")
        *classes, name = path.split(".")
        return functools.reduce(getattr, classes, importlib.import_module(module)), name

    def changed(self) -> str:
        """What of the function is not as the patch needs it, in words; empty if all is."""
        try:
            function = original(*self.owner())
            if not self.fits(list(inspect.signature(function).parameters)):
                return f"{self.place} no longer takes ({self.parameters})"
            if self.text and fingerprint(function) != self.text:
                return f"{self.place} is another function now"
        except (ImportError, AttributeError) as error:
            return f"{self.place} is gone ({error})"
        except (OSError, TypeError, ValueError) as error:  # no source, no function
            return f"{self.place} cannot be read ({error})"
        return ""

    def fits(self, parameters: list[str]) -> bool:
        """Whether a function with these parameters can be replaced."""
        *names, last = self.parameters.split()
        return set(names) <= set(parameters) if last == "*" else [*names, last] == parameters

    def apply(self, patch: str) -> None:
        """Replace the function, in the name of ``patch``."""
        wrap(*self.owner(), self.make, patch)


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable], patch: str) -> None:
    """Replace ``owner.name`` by ``make(owner.name)``, once for each patch.

    A second patch of the same function is put around the first.

    Raises:
        RuntimeError: the second patch does not call what it replaces, so the first would be lost.
    """
    before, method = _function(owner, name)
    earlier = [getattr(layer, _PATCH) for layer in _layers(before)]
    if patch in earlier:
        return
    function = make(before)
    cells = getattr(function, "__closure__", None) or ()
    if earlier and not any(cell.cell_contents is before for cell in cells):
        raise RuntimeError(
            f"the patch {patch!r} would undo {', '.join(map(repr, earlier))}: both replace {name}, "
            "and it does not call the function that it replaces"
        )
    # A copy: a module may keep the function, and the mark must not stay on that.
    patched = functools.wraps(before)(_copy(function))
    setattr(patched, _PATCH, patch)
    setattr(owner, name, method(patched) if method else patched)


def _copy(function: Any) -> Any:
    if not isinstance(function, types.FunctionType):
        return function
    parts = (function.__name__, function.__defaults__, function.__closure__)
    copied = types.FunctionType(function.__code__, function.__globals__, *parts)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def original(owner: Any, name: str) -> Callable:
    """``owner.name`` as vLLM has it, below all patches: a plain function, methods unbound."""
    function, _ = _function(owner, name)
    for layer in _layers(function):
        function = layer.__wrapped__
    return function


def fingerprint(function: Callable) -> str:
    """Names what is written in a function, whatever its indentation."""
    text = " ".join(inspect.getsource(function).split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _function(owner: Any, name: str) -> tuple[Any, type | None]:
    """The function behind ``owner.name``, and the kind of method that it is kept as, if any."""
    held = inspect.getattr_static(owner, name)
    if isinstance(held, classmethod | staticmethod):
        return held.__func__, type(held)
    return held, None


def _layers(function: Any) -> Iterator[Any]:
    """What patches put around vLLM's function, from the outermost on."""
    while function is not None:
        inner = getattr(function, "__wrapped__", None)
        mark = getattr(function, _PATCH, None)
        # Somebody else may have wrapped it once more: functools.wraps copies the mark as well.
        if mark is not None and getattr(inner, _PATCH, None) != mark:
            yield function
        function = inner
