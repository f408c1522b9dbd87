"""In place of torchvision, whose CPU build no plain registry has: vLLM's multimodal classes import
it, and use it for images alone, of which the tests have none."""

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

__version__ = "0.28.0"


class _Anything(Loader):
    """Modules with every name that is asked of them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        start = f"{__name__}."
        return ModuleSpec(name, _Anything(), is_package=True) if name.startswith(start) else None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        names: dict[str, MagicMock] = {}
        module.__getattr__ = lambda name: (
            _missing(name) if name.startswith("__") else names.setdefault(name, MagicMock())
        )
        return module

    def exec_module(self, module):
        pass


def _missing(name):
    raise AttributeError(name)


sys.meta_path.append(_Anything)
