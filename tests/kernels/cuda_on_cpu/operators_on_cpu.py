"""For check_*.py: operators and kernel rows of CUDA on the CPU, emulated. Importing it registers the operators.

The script's argument is the library of operators; cuda_emulator.check_operators runs it.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfq.kernels import cuda_ops, dispatch, native
from hfq.kernels.row import Problem

__all__ = ["emulated", "on_cpu", "refused", "strided", "use_row"]

assert cuda_ops.fragments_weight is not None  # defines the operators
native.load()  # operators that both libraries have are those of the one that is loaded later
torch.ops.load_library(sys.argv[1])
emulated = ctypes.CDLL(sys.argv[1])
assert emulated.operators_registered()


def on_cpu(row: type[Any]) -> Any:
    """A kernel row of this class as if the CPU were a GPU."""

    def reject(self: object, problem: Problem) -> str | None:
        return None

    return type(f"{row.__name__}OnCpu", (row,), {"reject": reject})()


def use_row(grid: type[Any], row: Any) -> None:
    """For weights of this class: `row`, or else the PyTorch reference."""
    dispatch._ROWS[grid] = (row, *dispatch._ROWS[grid][-1:])
    dispatch.select.cache_clear()


def refused(words: str, call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:
        assert re.search(words, str(error)), error
        return
    raise AssertionError(f"not refused: {words}")


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every other one of a larger tensor."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]
