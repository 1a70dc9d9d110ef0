"""Which kernel runs a problem, and why the others do not.

Kernel rows stand in one list, best first; the last one takes everything. Each names its reasons to refuse in
words, so `hfq.explain` can repeat them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ..core.weight import PackedGrid

__all__ = ["Choice", "KernelRow", "Problem", "as_stored", "rows", "select"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that a kernel needs to know before it takes a weight."""

    device: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    has_codebook: bool
    has_g_idx: bool

    @classmethod
    def of(cls, grid: PackedGrid) -> Problem:
        return cls(
            device=grid.qweight.device.type,
            bits=grid.bits,
            group_size=grid.group_size,
            in_features=grid.in_features,
            out_features=grid.out_features,
            has_codebook=grid.codebook is not None,
            has_g_idx=grid.g_idx is not None,
        )


class KernelRow(Protocol):
    """One way to multiply with a packed weight."""

    name: str

    def reject(self, problem: Problem) -> str | None:
        """Why this kernel cannot take the problem, or None."""

    def prepare(self, tensor: Tensor) -> Tensor:
        """Turn one neutral tensor (codes, scales or zero points) into the kernel's layout."""

    def restore(self, tensor: Tensor, out_features: int, row_bytes: int) -> Tensor:
        """The inverse of `prepare`, bit-exact. `row_bytes`: packed bytes of a row of codes."""

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        """``x W^T + bias``: x `[..., K]` -> `[..., N]` in x.dtype. `grid` is in the kernel's layout."""

    def rows(self, grid: PackedGrid, index: Tensor) -> PackedGrid:
        """The rows `index` (int64 `[T]`) of a grid in the kernel's layout, as a neutral grid `[T, ...]`."""

    def dequantize(self, grid: PackedGrid, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]` behind a grid in the kernel's layout."""


@dataclass(frozen=True)
class Choice:
    """The kernel that was chosen and the reasons of those before it."""

    row: KernelRow
    refused: tuple[tuple[str, str], ...]


@cache
def rows() -> tuple[KernelRow, ...]:
    """All kernel rows, best first."""
    from .cpu import CpuRows16
    from .neutral import Neutral

    return (CpuRows16(), Neutral())


def as_stored(reason: str) -> Choice:
    """The last kernel, which reads the stored layout, with the reason why no other one was asked."""
    *others, last = rows()
    return Choice(last, tuple((row.name, reason) for row in others))


@cache
def select(problem: Problem) -> Choice:
    """The first kernel that does not refuse the problem."""
    refused: list[tuple[str, str]] = []
    for row in rows():
        reason = row.reject(problem)
        if reason is None:
            return Choice(row, tuple(refused))
        refused.append((row.name, reason))
    raise AssertionError("the last row takes every problem")
