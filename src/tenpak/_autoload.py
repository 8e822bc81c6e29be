"""Registers tenpak's quantizer with transformers without importing transformers.

``import tenpak`` must be cheap, and yet ``AutoModelForCausalLM.from_pretrained`` must load artifacts after it. So the
quantizer is registered at once where transformers is already there, and otherwise right after its registry is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_with_transformers"]

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Make transformers know the quantization method ``tenpak``, now or when it is imported."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("tenpak.nn.quantizer")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only transformers' quantizer registry, once, and has it call ``_register`` when it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
