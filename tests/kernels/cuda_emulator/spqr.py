"""Format ``spqr``: products, dequantizing and look-ups."""

from __future__ import annotations

import torch
from torch import Tensor

from hfq.core.weight import SpqrGrid

from .launch import H100, INT, MANY, POINTER, SIZE, Launchers, Params, fields, output


class SpqrWeight(Params):
    """kernels/cuda/spqr.h, like the next two."""

    _fields_ = (
        *fields(POINTER, "qweight", "stat_codes", "stats"),
        *fields(POINTER, "offsets", "columns", "values"),
        *fields(SIZE, "out_features", "in_features", "groups", "stat_groups"),
        *fields(SIZE, "group_size", "rows_per_stat", "outliers"),
        *fields(INT, "bits", "wide_codes", "wide_columns", "stat_dtype"),
    )


class SpqrLinearParams(Params):
    _fields_ = (
        ("weight", SpqrWeight),
        *fields(POINTER, "x", "bias", "y"),
        ("tokens", SIZE),
        *fields(INT, "x_dtype", "bias_dtype"),
        ("workspace", POINTER),
        *fields(INT, "short_groups", "last_group", "group_magic"),
        *fields(INT, "row_bytes", "steps", "last_step", "stages", "stage_bytes"),
        *fields(INT, "tile_stats", "stage_tokens", "ring_bytes"),
    )


class SpqrUnpackParams(Params):
    _fields_ = (
        ("weight", SpqrWeight),
        *fields(POINTER, "index", "y"),
        ("rows", SIZE),
        *fields(INT, "y_dtype", "group_magic", "tiles_per_stat"),
    )


def _weight(grid: SpqrGrid) -> SpqrWeight:
    same = (
        *("qweight", "stat_codes", "stats", "offsets", "columns", "values"),
        *("out_features", "in_features", "group_size", "bits"),
    )
    return SpqrWeight(
        **{name: getattr(grid, name) for name in same},
        groups=grid.stats.shape[-2],
        stat_groups=grid.stat_codes.shape[-3],
        rows_per_stat=grid.stat_group_size,
        outliers=len(grid.columns),
        wide_codes=grid.stat_bits > 4,
        wide_columns=grid.columns.dtype == torch.int32,
        stat_dtype=grid.stats.dtype,
    )


class Spqr(Launchers):
    def spqr_linear(
        self,
        x: Tensor,
        grid: SpqrGrid,
        bias: Tensor | None,
        multiprocessors: int = MANY,
        shared_bytes: int = H100,
    ) -> Tensor:
        """`grid`: in the layout of the kernel row. One multiprocessor takes two tiles at once."""
        y = output(len(x), grid.out_features, dtype=x.dtype)
        params = SpqrLinearParams(weight=_weight(grid), x=x, bias=bias, y=y, tokens=len(x))
        self.set_device(multiprocessors, shared_bytes)
        workspace = torch.full((self.ask("spqr_workspace", params),), torch.nan)
        params.workspace = workspace.data_ptr()
        self.launch("spqr_linear", params, y, workspace)
        return y

    def spqr_unpack(self, index: Tensor | None, grid: SpqrGrid, dtype: torch.dtype) -> Tensor:
        """The rows `index`, or all of them."""
        rows = grid.out_features if index is None else len(index)
        y = output(rows, grid.in_features, dtype=dtype)
        params = SpqrUnpackParams(weight=_weight(grid), index=index, y=y, rows=rows)
        self.launch("spqr_unpack", params, y)
        return y
