"""Which kernel runs a problem, and why the others do not.

Kernel rows stand in one list, best first; the last one takes everything. Each names its reasons to refuse in
words, so `hfq.explain` can repeat them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .cpu import CpuRows16
from .cpu_int8 import CpuInt8
from .neutral import Neutral
from .row import KernelRow, Problem

__all__ = ["Choice", "as_stored", "rows", "select"]


@dataclass(frozen=True)
class Choice:
    """The kernel that was chosen and the reasons of those before it."""

    row: KernelRow
    refused: tuple[tuple[str, str], ...]


@cache
def rows() -> tuple[KernelRow, ...]:
    """All kernel rows, best first."""
    return (CpuRows16(), CpuInt8(), Neutral())


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
