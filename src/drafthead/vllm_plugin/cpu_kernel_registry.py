"""An engine on the CPU starts in a process that has numba loaded (n-gram speculation loads it).

Registering the CPU's twins of Triton kernels looks through every module's values for an attribute
``kernel``, and takes for granted that ``vars()`` of a value is a mapping. It is not for numba's
wrappers of C functions: ``'_lib_fn_wrapper' object has no attribute 'get'``.
"""

import builtins
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

from vllm.triton_utils import dispatcher


class _Wrapper:
    """As numba's: its attributes are no mapping."""

    __dict__ = property(lambda self: print)  # type: ignore[assignment]


def needed() -> bool:
    """Whether registering kernels ends at a module that holds such a value."""
    module = ModuleType("probe")
    module.value = _Wrapper()  # type: ignore[attr-defined]
    modules = SimpleNamespace(modules={"probe": module})
    try:
        with (
            patch.object(dispatcher, "sys", modules),
            patch.object(dispatcher, "vars", builtins.vars, create=True),
        ):
            dispatcher._rebind_kernels([])
    except AttributeError:
        return True
    return False


def apply() -> None:
    """Let the name ``vars`` in vLLM's module mean :func:`attributes`."""
    dispatcher.vars = attributes  # type: ignore[attr-defined]


def attributes(value: object) -> Mapping:
    """``vars(value)``, or nothing if that is no mapping."""
    found = builtins.vars(value)
    return found if isinstance(found, Mapping) else {}
