"""CUDA kernels of format ``spqr``: dense low-bit weights and sparse outliers in one pass.

Up to 256 tokens: the packed weight is read directly (`cuda_spqr_linear`), scales decoded in the kernel. More: it is
dequantized, some rows at a time, and multiplied by the matrix library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.weight import SpqrGrid
from . import fragments, spqr_fragments
from .cpu import call
from .cuda import takes_all_experts
from .cuda_machine import no_native_code
from .cuda_packing_ops import to_fragments
from .cuda_spqr_ops import spqr_fragments_weight
from .dense_products import native_dtype
from .neutral_spqr import operands, sizes
from .row import AllAtOnce, Problem

__all__ = ["MAX_DIRECT_TOKENS", "CudaSpqr"]

# Each 64 tokens compute the weight's numbers once more. Reasoned, not measured: that takes 20 to 25 us for 4096 x 14336 on an H200,
# where 256 tokens dequantized take 135.
MAX_DIRECT_TOKENS = 256

# Of experts, in one launch. One after the other costs some 20 us more for each, in which 64 tokens meet so many weights. Likewise.
_EXPERT_PRODUCTS = 1 << 31

_MOST_COLUMNS = 1 << 19
# Columns of one matrix instruction: groups end with them.
_HALF = 16


class CudaSpqr(AllAtOnce):
    """Native CUDA kernels; see `kernels/cuda/spqr_linear_kernel.h` and `spqr_gemm.h`."""

    name = "cuda_spqr"

    def reject(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"runs on cuda, the weight is on {problem.device}"
        if problem.bits not in (2, 3, 4):
            return f"takes 2, 3 and 4 bits, not {problem.bits}"
        if problem.in_features % fragments.COLUMN_UNIT or problem.in_features >= _MOST_COLUMNS:
            return f"takes columns in multiples of {fragments.COLUMN_UNIT} below {_MOST_COLUMNS}, not {problem.in_features}"
        size = problem.group_size
        if size < problem.in_features and size % _HALF:
            return f"takes groups in multiples of {_HALF} columns, those of one matrix instruction, not {size}"
        if problem.stat_group_size % fragments.ROWS:
            return f"takes stat_group_size in multiples of {fragments.ROWS}, not {problem.stat_group_size}"
        return no_native_code()

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        return to_fragments(tensor, bits, halves=True)

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        return fragments.from_fragments(tensor, shape, bits, halves=True)

    def prepare_stats(self, tensor: Tensor, stat_bits: int) -> Tensor:
        return spqr_fragments.to_stat_pairs(tensor, stat_bits)

    def restore_stats(self, tensor: Tensor, shape: tuple[int, ...], stat_bits: int) -> Tensor:
        return spqr_fragments.from_stat_pairs(tensor, shape, stat_bits)

    def linear(
        self, x: Tensor, grid: SpqrGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features)
        arguments = (*operands(grid), bias, *sizes(grid), grid.out_features)
        # Wider activations keep their precision: the kernel would round them to 16 bits.
        if x.dtype.itemsize == 2 and tokens.shape[0] <= MAX_DIRECT_TOKENS:
            y = call(torch.ops.hfq.cuda_spqr_linear, tokens.contiguous(), *arguments)
        else:
            y = torch.ops.hfq.cuda_spqr_linear_dequantized(tokens, *arguments)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features)
        return out

    def all_experts(self, x: Tensor, counts: Tensor, grid: SpqrGrid, bias: Tensor | None) -> Tensor:
        arguments = (*operands(grid), bias, *sizes(grid), grid.out_features)
        y: Tensor = torch.ops.hfq.cuda_spqr_experts_linear(x, counts, *arguments)
        return y

    def reads_counts_on_device(self, x: Tensor, tokens: int, grid: SpqrGrid) -> bool:
        each = MAX_DIRECT_TOKENS + _EXPERT_PRODUCTS // (grid.in_features * grid.out_features)
        return x.dtype.itemsize == 2 and takes_all_experts(x, tokens, grid, each)

    def lookup(self, grid: SpqrGrid, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows: Tensor = torch.ops.hfq.cuda_spqr_lookup(
            index.long(), *operands(grid), *sizes(grid), grid.out_features, native_dtype(dtype)
        )
        return rows.to(dtype)

    def dequantize(self, grid: SpqrGrid, dtype: torch.dtype) -> Tensor:
        return spqr_fragments_weight(operands(grid), (*sizes(grid), grid.out_features), dtype)
