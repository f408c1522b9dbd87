"""How a mend replaces a function of vLLM, and how it finds out whether it must."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

log = init_logger("vllm.plugins.drafthead")

_MARK = "_drafthead_mend"


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make(owner.name)``, once however often it is called."""
    stock = getattr(owner, name)
    if hasattr(stock, _MARK):
        return
    mended = functools.wraps(stock)(make(stock))
    setattr(mended, _MARK, stock)
    setattr(owner, name, mended)


def still_has(function: Any, fault: str, mend: str) -> bool:
    """Whether the source of ``function`` still has the text ``fault``; says so when it has not."""
    stock = getattr(function, _MARK, function)
    if fault in inspect.getsource(stock):
        return True
    step_aside(mend)
    return False


def step_aside(mend: str) -> None:
    """Say that ``mend`` is not applied since vLLM does without."""
    log.info_once("drafthead: vLLM no longer needs the mend %r; it steps aside.", mend)
