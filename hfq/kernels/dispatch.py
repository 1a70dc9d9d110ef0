"""Which kernel runs a problem, and why the others do not.

Each class of grids has a list of kernel rows, best first; the last one takes everything. Each names its reasons to
refuse in words, so `hfq.explain` can repeat them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ..core.weight import Fp8Grid, Grid, PackedGrid, SpqrGrid
from .cpu import CpuRows16
from .cpu_fp8 import CpuFp8
from .cpu_int8 import CpuInt8
from .cpu_spqr import CpuSpqr
from .cuda import CudaFragments
from .cuda_fp8 import CudaFp8, CudaFp8Library, CudaFp8Weights, CudaFp8Widened
from .cuda_int8 import CudaInt8
from .cuda_spqr import CudaSpqr
from .neutral import Neutral
from .neutral_fp8 import NeutralFp8
from .neutral_spqr import NeutralSpqr
from .row import KernelRow, Problem

__all__ = ["Choice", "as_stored", "rows", "select"]


@dataclass(frozen=True)
class Choice:
    """The kernel that was chosen and the reasons of those before it."""

    row: KernelRow[Any]
    refused: tuple[tuple[str, str], ...]


# A plain table, not a cached function: `as_stored` is called inside forwards that a compiler traces.
_ROWS: dict[type[Grid], tuple[KernelRow[Any], ...]] = {
    PackedGrid: (CpuRows16(), CpuInt8(), CudaFragments(), CudaInt8(), Neutral()),
    Fp8Grid: (
        CpuFp8(),
        *(CudaFp8(), CudaFp8Library(), CudaFp8Widened(), CudaFp8Weights()),
        NeutralFp8(),
    ),
    SpqrGrid: (CpuSpqr(), CudaSpqr(), NeutralSpqr()),
}


def rows(kind: type[Grid] = PackedGrid) -> tuple[KernelRow[Any], ...]:
    """All kernel rows for a class of grids, best first."""
    return _ROWS[kind]


def as_stored(grid: Grid, reason: str) -> Choice:
    """The kernel that reads the stored layout, with the reason why no other one was asked."""
    *others, last = rows(type(grid))
    return Choice(last, tuple((row.name, reason) for row in others))


@cache
def select(problem: Problem) -> Choice:
    """The first kernel that does not refuse the problem."""
    refused: list[tuple[str, str]] = []
    for row in rows(problem.kind):
        reason = row.reject(problem)
        if reason is None:
            return Choice(row, tuple(refused))
        refused.append((row.name, reason))
    raise AssertionError("the last row takes every problem")
