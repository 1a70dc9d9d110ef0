"""Rounding column by column, each column answering for the errors of those before it: the loop of GPTQ and SpQR.

The equations are in `hfq.core.statistics.Factor`; what a method adds are grids, and which weights are stored apart.
Operator of the loop (all columns lie in rows, so that each is one run of memory):

    hfq::round_columns(targets [B, N], origins [B, N], asked [B, B], groups [B], scales [G, N], zeros? [G, N],
                       codebook? [16], bits) -> (codes uint8 [B, N], changes float32 [B, N])

Column i is rounded from ``targets[i] + sum over j < i of asked[i, j] * changes[j]``, and what it changes is its
origin less its rounded value. All float32, groups int32. In PyTorch here; native code for the CPU (kernels/cpu).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import affine
from .spec import QuantSpec
from .statistics import Factor

__all__ = [
    "COLUMN_BLOCK",
    "ColumnGrid",
    "ColumnRounder",
    "ColumnRounding",
    "StaticGrid",
    "round_one_by_one",
]

# One column of corrected weights, float32 `[N]`, to (codes, rounded weights); see `affine.column_rounder`.
ColumnRounder = Callable[[Tensor], tuple[Tensor, Tensor]]

# Columns that are corrected one by one; those further on get the sum of a block's corrections as one product.
COLUMN_BLOCK = 128

_LIBRARY: Any = torch.library.Library("hfq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "round_columns(Tensor targets, Tensor origins, Tensor asked, Tensor groups, Tensor scales, Tensor? zeros, "
    "Tensor? codebook, int bits) -> (Tensor, Tensor)"
)


def _round_columns(
    targets: Tensor,
    origins: Tensor,
    asked: Tensor,
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    points: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    rounders = _rounders(groups, scales, zeros, points, bits)
    return round_one_by_one(targets, origins, asked, rounders)


def _rounders(
    groups: Tensor, scales: Tensor, zeros: Tensor | None, points: Tensor | None, bits: int
) -> list[ColumnRounder]:
    """One for each column; columns of one group share it."""
    numbers = groups.tolist()
    of_group = {
        group: affine.column_rounder(
            scales[group], None if zeros is None else zeros[group], points, bits
        )
        for group in set(numbers)
    }
    return [of_group[group] for group in numbers]


_LIBRARY.impl("round_columns", _round_columns, "CompositeExplicitAutograd")


def round_one_by_one(
    targets: Tensor, origins: Tensor, asked: Tensor, rounders: Sequence[ColumnRounder]
) -> tuple[Tensor, Tensor]:
    """``hfq::round_columns`` with any rounder for each column."""
    codes = torch.empty(targets.shape, dtype=torch.uint8, device=targets.device)
    changes, targets = torch.empty_like(targets), targets.clone()
    for index, rounder in enumerate(rounders):
        codes[index], rounded = rounder(targets[index])
        torch.sub(origins[index], rounded, out=changes[index])
        targets[index + 1 :].addr_(asked[index + 1 :, index], changes[index])
    return codes, changes


class ColumnGrid(Protocol):
    """What columns are rounded to."""

    def round(
        self, columns: Tensor, targets: Tensor, origins: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`round_columns` of some columns, int64 `[B]`."""


class StaticGrid:
    """A grid that is known before the first column is rounded.

    Args:
        group_size: columns per group; more than there are where the grid has one group.
    """

    def __init__(self, grid: affine.StoredGrid, spec: QuantSpec, group_size: int) -> None:
        self.scales = grid.scales.float().T.contiguous()
        self.zeros = None if grid.float_zeros is None else grid.float_zeros.T.contiguous()
        self.codebook = affine.codebook_of(spec, self.scales.device)
        self.bits, self.group_size = spec.bits, group_size

    def round(
        self, columns: Tensor, targets: Tensor, origins: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `ColumnGrid`."""
        groups = self._groups(columns)
        found: tuple[Tensor, Tensor] = torch.ops.hfq.round_columns(
            *(targets, origins, asked.contiguous(), groups),
            *(self.scales, self.zeros, self.codebook, self.bits),
        )
        return found

    def rounders(self, columns: Tensor) -> list[ColumnRounder]:
        """Of each of some columns, int64 `[B]`: for those who do more than to round."""
        return _rounders(self._groups(columns), self.scales, self.zeros, self.codebook, self.bits)

    def _groups(self, columns: Tensor) -> Tensor:
        return (columns // self.group_size).int()


class ColumnRounding:
    """One weight on its way to codes. Columns lie in rows here, so that each is one run of memory.

    Attributes:
        columns: the weight in the order of rounding, float32 `[K, N]`.
        errors: w - q of the columns that are done, float32 `[K, N]`.
    """

    def __init__(self, weight: Tensor, factor: Factor) -> None:
        self.factor = factor
        self.columns = weight.T.contiguous()[factor.order]
        self.errors = torch.empty_like(self.columns)
        self._codes = torch.empty(self.columns.shape, dtype=torch.uint8, device=weight.device)

    def __len__(self) -> int:
        return len(self.columns)

    def expected(self, first: int, last: int) -> Tensor:
        """What columns would be rounded from if rounding them made no errors: `[last - first, N]`.

        A column that takes its correction differs from the weight by it, and passes that on like any error.
        """
        among = self.factor.feedback[first:last, first:last].T
        taken: Tensor = torch.linalg.solve_triangular(
            among, self._corrections(first, last), upper=False, unitriangular=True
        )
        return self.columns[first:last] + taken

    def round(self, first: int, last: int, grid: ColumnGrid) -> None:
        """Round neighbouring columns, each correcting the ones after it."""
        for start in range(first, last, COLUMN_BLOCK):
            block = slice(start, min(start + COLUMN_BLOCK, last))
            origins = self.columns[block]
            targets = origins + self._corrections(block.start, block.stop)
            asked = self.factor.feedback[block, block].T
            codes, errors = grid.round(self.factor.order[block], targets, origins, asked)
            self._codes[block], self.errors[block] = codes, errors

    def codes(self) -> Tensor:
        """Uint8 `[N, K]`, in the order of the weight."""
        codes = torch.empty_like(self._codes).index_copy_(0, self.factor.order, self._codes)
        return codes.T.contiguous()

    def _corrections(self, first: int, last: int) -> Tensor:
        """What columns before `first` ask of the columns from `first` to `last`: `[last - first, N]`."""
        corrections: Tensor = self.factor.feedback[:first, first:last].T @ self.errors[:first]
        return corrections
