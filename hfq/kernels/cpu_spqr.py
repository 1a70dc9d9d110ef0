"""CPU kernels of format ``spqr``: codes in layout ``rows16``, scales decoded in the kernel, outliers in the same pass.

Few tokens: the packed weight is read directly (`cpu_spqr_linear`), activations in float32. Many tokens: dequantize
natively into the dtype of x and let the matrix library multiply.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.bits import packed_bytes
from ..core.spec import group_count
from ..core.weight import SpqrGrid
from . import rows16
from .cpu import call, no_native_code
from .dense_products import widened
from .neutral_spqr import NeutralSpqr, operands, pick_outliers, sizes
from .row import OneByOne, Problem
from .spqr_ops import spqr_rows16_weight

__all__ = ["MAX_DIRECT_TOKENS", "CpuSpqr"]

# As for `hfq.kernels.cpu` with float32 activations.
MAX_DIRECT_TOKENS = 32

# Groups may end after every fourth column that a kernel has unpacked.
_QUAD = 4


class CpuSpqr(OneByOne):
    """Native CPU kernels; see `kernels/cpu/spqr_body.h`."""

    name = "cpu_spqr"

    def reject(self, problem: Problem) -> str | None:
        reason = no_native_code(problem)
        if reason is not None:
            return reason
        if problem.bits not in (2, 3, 4):
            return f"takes 2, 3 and 4 bits, not {problem.bits}"
        size = problem.group_size
        if size < problem.in_features and size % _QUAD:
            return f"takes groups in multiples of {_QUAD} columns, not {size}"
        if problem.stat_group_size % rows16.ROWS:
            return f"takes stat_group_size in multiples of {rows16.ROWS}, not {problem.stat_group_size}"
        return None

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        return rows16.to_rows16(tensor) if tensor.dtype == torch.uint8 else tensor

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        return rows16.from_rows16(tensor, shape)

    def linear(
        self, x: Tensor, grid: SpqrGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features)
        arguments = (*operands(grid), bias, *sizes(grid), grid.out_features)
        # The direct kernel computes in float32: too little for float64, which nobody uses for speed.
        if tokens.shape[0] <= MAX_DIRECT_TOKENS and x.dtype != torch.float64:
            y = call(torch.ops.hfq.cpu_spqr_linear, tokens.contiguous(), *arguments)
        else:
            y = torch.ops.hfq.cpu_spqr_linear_dequantized(widened(tokens), *arguments).to(x.dtype)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features)
        return out

    def lookup(self, grid: SpqrGrid, index: Tensor, dtype: torch.dtype) -> Tensor:
        # In the stored layout: few rows.
        groups = group_count(grid.in_features, grid.group_size)
        rows = replace(
            pick_outliers(grid, index),
            qweight=rows16.pick_rows(
                grid.qweight, index, packed_bytes(grid.in_features, grid.bits)
            ),
            stat_codes=rows16.pick_rows(
                grid.stat_codes, index, packed_bytes(2 * groups, grid.stat_bits)
            ),
        )
        return NeutralSpqr().dequantize(rows, dtype)

    def dequantize(self, grid: SpqrGrid, dtype: torch.dtype) -> Tensor:
        return spqr_rows16_weight(operands(grid), (*sizes(grid), grid.out_features), dtype)
