"""Makes "hfq" known to Transformers, without importing the heavy parts of Transformers for it.

`transformers.quantizers.auto` takes seconds to import. If it is loaded already, hfq registers at once; if not, a
finder waits for its import and registers right after.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register"]

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register `HfqConfig` and `HfqQuantizer` now or as soon as Transformers' registry is imported."""
    if _REGISTRY in sys.modules:
        _register_now(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the registry module like everybody else, and adds a step after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register_now(module)


def _register_now(registry: ModuleType) -> None:
    if "hfq" in registry.AUTO_QUANTIZER_MAPPING:
        return
    from ..config import HfqConfig
    from .transformers import HfqQuantizer

    registry.register_quantization_config("hfq")(HfqConfig)
    registry.register_quantizer("hfq")(HfqQuantizer)
    # Lets HfqConfig(dequantize=True) reach a checkpoint that has its own config.
    vars(registry)["LOADING_ATTRIBUTES_CONFIG_TYPES"] += (HfqConfig,)
