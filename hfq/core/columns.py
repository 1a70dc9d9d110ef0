"""Rounding column by column, each column answering for the errors of those before it: the loop of GPTQ and SpQR.

The equations are in `hfq.core.statistics.Factor`; what a method adds are grids, and which weights are stored apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import affine
from .spec import QuantSpec
from .statistics import Factor

__all__ = ["COLUMN_BLOCK", "ColumnRounder", "ColumnRounding", "static_rounders"]

# One column of corrected weights, float32 `[N]`, to (codes, rounded weights); see `affine.column_rounder`.
ColumnRounder = Callable[[Tensor], tuple[Tensor, Tensor]]

# Columns that are corrected one by one; those further on get the sum of a block's corrections as one product.
COLUMN_BLOCK = 128


class ColumnRounding:
    """One weight on its way to codes. Columns lie in rows here, so that each is one run of memory.

    Attributes:
        columns: the weight in the order of rounding, float32 `[K, N]`.
        errors: w - q of the columns that are done, float32 `[K, N]`.
    """

    def __init__(self, weight: Tensor, factor: Factor) -> None:
        self.factor = factor
        self.columns = weight[:, factor.order].T.contiguous()
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

    def round(self, first: int, rounders: Sequence[ColumnRounder]) -> None:
        """Round neighbouring columns from `first` on, each correcting the ones after it."""
        for start in range(0, len(rounders), COLUMN_BLOCK):
            self._round_block(first + start, rounders[start : start + COLUMN_BLOCK])

    def codes(self) -> Tensor:
        """Uint8 `[N, K]`, in the order of the weight."""
        codes = torch.empty_like(self._codes).index_copy_(0, self.factor.order, self._codes)
        return codes.T.contiguous()

    def _corrections(self, first: int, last: int) -> Tensor:
        """What columns before `first` ask of the columns from `first` to `last`: `[last - first, N]`."""
        corrections: Tensor = self.factor.feedback[:first, first:last].T @ self.errors[:first]
        return corrections

    def _round_block(self, first: int, rounders: Sequence[ColumnRounder]) -> None:
        last = first + len(rounders)
        block = self.columns[first:last] + self._corrections(first, last)
        for index, rounder in enumerate(rounders):
            column = first + index
            codes, rounded = rounder(block[index])
            self._codes[column] = codes
            torch.sub(self.columns[column], rounded, out=self.errors[column])
            block[index + 1 :].addr_(
                self.factor.feedback[column, column + 1 : last], self.errors[column]
            )


def static_rounders(grid: affine.StoredGrid, spec: QuantSpec, order: Tensor) -> list[ColumnRounder]:
    """A rounder for each column in the order of rounding, where all grids are known before the first is rounded."""
    scales = grid.scales.float().T.contiguous()
    zeros = None if grid.float_zeros is None else grid.float_zeros.T.contiguous()
    rounders = affine.group_rounders(scales, zeros, spec)
    size = spec.group_size
    return [rounders[0 if size == -1 else column // size] for column in order.tolist()]
