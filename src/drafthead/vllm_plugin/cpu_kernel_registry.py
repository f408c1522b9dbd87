"""An engine on the CPU starts in a process that has numba loaded (n-gram speculation loads it).

Registering the CPU's twins of Triton kernels looks through every module's values for an attribute
``kernel``, and takes for granted that ``vars()`` of a value is a mapping. It is not for numba's
wrappers of C functions: ``'_lib_fn_wrapper' object has no attribute 'get'``.
"""

import builtins
from collections.abc import Mapping
from types import ModuleType

from vllm.platforms import current_platform

from .patch import still_has

FAULT = 'vars(value).get("kernel")'


def apply() -> None:
    if not current_platform.is_cpu():
        return
    from vllm.triton_utils import dispatcher

    if still_has(dispatcher._rebind_kernels, FAULT, "cpu_kernel_registry"):
        _shadow_vars(dispatcher)


def _shadow_vars(module: ModuleType) -> None:
    """Let the name ``vars`` in ``module`` mean :func:`attributes`."""
    module.vars = attributes  # type: ignore[attr-defined]


def attributes(value: object) -> Mapping:
    """``vars(value)``, or nothing if that is no mapping."""
    found = builtins.vars(value)
    return found if isinstance(found, Mapping) else {}
