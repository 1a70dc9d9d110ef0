"""Name -> implementation, filled by the files of one package.

A registry imports every module of its package at the first look-up, and each module registers what it
defines. So a new algorithm, format or kernel is one new file, and `import hfq` stays light.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Generic, TypeVar

from .errors import UnknownNameError, nearest

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations by name.

    Args:
        kind: what the names stand for; used in error messages ("method", "format").
        package: the package whose modules register themselves, e.g. ``"hfq.formats"``.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, item: T) -> T:
        """Add `item` under `name`; two items of one name are a programming error."""
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._items[name] = item
        return item

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        self._load()
        return tuple(sorted(self._items))

    def get(self, name: str) -> T:
        """The item of that name, or `UnknownNameError` with the nearest known one."""
        names = self.names()
        if name not in names:
            raise UnknownNameError(
                f"unknown {self.kind} {name!r}: expected one of {', '.join(names)}."
                f"{nearest(str(name), names)}"
            )
        return self._items[name]

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        # Only now: another thread must not see half of the names, and a failed import is tried again.
        self._loaded = True
