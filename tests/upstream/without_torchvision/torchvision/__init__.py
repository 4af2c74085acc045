"""Stands in for torchvision, which vLLM's multimodal models import and these tests do not use.

Its CUDA builds do not go with a CPU torch. Every name can be imported; none does anything.
"""

import importlib.machinery
import sys
import types

__version__ = "0.0"


class _Anything(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


for _name in ("io", "ops", "transforms", "transforms.functional", "transforms.v2"):
    _module = _Module(f"{__name__}.{_name}")
    _module.__spec__ = importlib.machinery.ModuleSpec(_module.__name__, None)
    _module.__path__ = []
    sys.modules[_module.__name__] = _module
sys.modules[f"{__name__}.transforms.v2.functional"] = sys.modules[f"{__name__}.transforms"]
