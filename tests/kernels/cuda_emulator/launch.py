"""Calls of launchers: their structs filled from tensors, the memory that a kernel may touch, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
FLOAT, BOOL = ctypes.c_float, ctypes.c_bool

# More multiprocessors than any product here fills; shared memory of a thread block of an H100.
MANY, H100 = 1 << 20, 227 << 10

# Fields that point to what no kernel writes that lets the next one start: parts of weights.
_CONSTANTS = frozenset(
    (
        *("qweight", "scales", "zeros", "codebook", "bias", "weight", "input_scale"),
        *("stat_codes", "stats", "offsets", "columns", "values"),
    )
)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def fields(kind: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    """Fields of a struct that have one type."""
    return tuple((name, kind) for name in names)


class Params(ctypes.Structure):
    """A struct of kernels/cuda. Tensors stand for their addresses, dtypes for their numbers, None for 0; ``x_dtype`` is that of ``x``.

    Attributes:
        constants, tensors: parts of weights, and what else the struct points to.
    """

    def __init__(self, **values: Any) -> None:
        for name, _ in self._fields_:
            tensor = values.get(name.removesuffix("_dtype"))
            if name.endswith("_dtype") and isinstance(tensor, Tensor):
                values[name] = tensor.dtype
        self.constants: list[Tensor] = []
        self.tensors: list[Tensor] = []
        for name, value in values.items():
            if isinstance(value, Tensor):
                (self.constants if name in _CONSTANTS else self.tensors).append(value)
            elif isinstance(value, Params):
                self.constants += value.constants
                self.tensors += value.tensors
        super().__init__(**{name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, torch.dtype):
        return _DTYPES[value]
    return 0 if value is None else value


def output(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result; what a kernel leaves out does not look like one."""
    return torch.full(shape, 12345.0, dtype=dtype)


class Launchers:
    """Those of all kernels, in the library that was compiled."""

    def __init__(self, library: Path) -> None:
        self.folder = library.parent
        self._library = ctypes.CDLL(str(library))

    def set_device(self, multiprocessors: int, shared_bytes: int = H100) -> None:
        """The GPU has `multiprocessors`, and gives a thread block `shared_bytes` of shared memory."""
        self._library.set_multiprocessors(multiprocessors)
        self._library.set_shared_bytes(ctypes.c_size_t(shared_bytes))

    def watch_races(self, wanted: bool) -> None:
        """Whether launches fail where nothing orders two accesses to memory (cuda_on_cpu/races.h)."""
        self._library.watch_races(wanted)

    def ask(self, name: str, params: Params) -> int:
        """A number that a function makes of a launcher's parameters."""
        function = getattr(self._library, name)
        function.restype = SIZE
        return int(function(ctypes.byref(params)))

    def launch(self, name: str, params: Params, *written: Tensor) -> None:
        """A kernel may read the tensors of its parameters, and write to `written`."""
        self.call(name, params.tensors, written, ctypes.byref(params), constants=params.constants)

    def call(
        self,
        name: str,
        read: Sequence[Tensor],
        written: Sequence[Tensor],
        *arguments: Any,
        constants: Sequence[Tensor] = (),
    ) -> None:
        """`constants`: may be read before the kernel in front has ended."""
        self._library.forget_all()
        for tensors, access in ((constants, 0), (read, 1), (written, 2)):
            for tensor in tensors:
                assert tensor.is_contiguous()
                size = ctypes.c_size_t(tensor.numel() * tensor.element_size())
                self._library.allow(POINTER(tensor.data_ptr()), size, access)
        launcher = getattr(self._library, name)
        launcher.restype = ctypes.c_char_p
        error = launcher(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())
