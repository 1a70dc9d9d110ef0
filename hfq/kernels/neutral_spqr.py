"""The kernel that is always right for format ``spqr``: dequantize the stored layout, then multiply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.weight import SpqrGrid
from . import spqr_ops  # noqa: F401  (defines torch.ops.hfq.spqr_*)
from .row import AsStored

__all__ = ["NeutralSpqr", "operands", "pick_outliers", "sizes"]


class NeutralSpqr(AsStored):
    """Dequantize and multiply, any device and shape."""

    name = "dequantize_spqr"

    def linear(
        self, x: Tensor, grid: SpqrGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        y: Tensor = torch.ops.hfq.spqr_linear(x, *operands(grid), bias, *sizes(grid))
        return y

    def lookup(self, grid: SpqrGrid, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows = replace(
            pick_outliers(grid, index),
            qweight=grid.qweight[index],
            stat_codes=grid.stat_codes[index],
        )
        return self.dequantize(rows, dtype)

    def dequantize(self, grid: SpqrGrid, dtype: torch.dtype) -> Tensor:
        weight: Tensor = torch.ops.hfq.spqr_dequantize(*operands(grid), *sizes(grid), dtype)
        return weight


def operands(grid: SpqrGrid) -> tuple[Any, ...]:
    """The tensors of a grid, in the order of the operators' schemas."""
    return (
        grid.qweight,
        grid.stat_codes,
        grid.stats,
        grid.offsets,
        grid.columns,
        grid.values,
    )


def sizes(grid: SpqrGrid) -> tuple[int, ...]:
    """The numbers of a grid, likewise."""
    return (
        grid.bits,
        grid.group_size,
        grid.stat_bits,
        grid.stat_group_size,
        grid.in_features,
    )


def pick_outliers(grid: SpqrGrid, index: Tensor) -> SpqrGrid:
    """The rows `index` (int64 `[T]`), all but their codes: each with stats of its own, and its outliers."""
    first = grid.offsets[index].long()
    counts = grid.offsets[index + 1].long() - first
    ends = counts.cumsum(0)
    places = torch.arange(int(counts.sum()), device=index.device)
    places = places + (first - (ends - counts)).repeat_interleave(counts)
    return replace(
        grid,
        stats=grid.stats[index // grid.stat_group_size],
        stat_group_size=1,
        offsets=torch.nn.functional.pad(ends, (1, 0)).int(),
        columns=grid.columns[places],
        values=grid.values[places],
        out_features=index.shape[0],
    )
