"""CPU kernels on the ``rows16`` layout: integers of 2, 3, 4 and 8 bits, codebooks of 4.

Few tokens, and any number with int8 activations: the packed weight is read directly (`cpu_linear`). Where there are matrix
units, the same operator uses them for many tokens, with int8 or bfloat16 activations. Otherwise dequantize and let the matrix
library multiply, which costs one more pass over the weight and reuses it for all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core.weight import PackedGrid
from . import native, rows16
from .dense_products import native_dtype, widened
from .ops import rows16_weight
from .row import OneByOne, Problem, stack_tiles

__all__ = ["MAX_DIRECT_TOKENS", "CpuRows16", "call", "no_native_code"]

# Up to here `cpu_linear` is faster than dequantizing (8192x2048 and 2048x8192 int4, 2 cores with AVX-512 VNNI and
# AMX, benchmarks/NOTES.md), by whether activations are quantized to int8. Without AMX the matrix library is 4 to 10 times
# slower than integer products of any number of tokens.
MAX_DIRECT_TOKENS = {False: 32, True: 128}

# Columns that begin with a new word, by bits: groups have to.
_UNITS = {2: 16, 3: 32, 4: 8, 8: 4}
# Columns of a tile of the matrix units, by whether activations are quantized to int8: groups end with a tile.
_TILE_COLUMNS = {False: 32, True: 64}


class CpuRows16(OneByOne):
    """Native CPU kernels; see `kernels/cpu/`."""

    name = "cpu_rows16"
    max_direct_tokens: ClassVar[Mapping[bool, int]] = MAX_DIRECT_TOKENS

    def reject(self, problem: Problem) -> str | None:
        reason = no_native_code(problem)
        if reason is not None:
            return reason
        if problem.activation is not None:
            return f"takes float activations, this weight asks for int8 ({problem.activation})"
        if problem.bits not in _UNITS:
            return f"takes 2, 3, 4 and 8 bits, not {problem.bits}"
        if problem.has_g_idx:
            return "takes groups of neighbouring columns only, the weight has a g_idx"
        unit = _UNITS[problem.bits]
        if problem.group_size % unit and problem.group_size < problem.in_features:
            return f"takes group sizes that are multiples of {unit} at {problem.bits} bits, not {problem.group_size}"
        return None

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        return rows16.to_rows16(tensor, split=bits == 3)

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        return rows16.from_rows16(tensor, shape, split=bits == 3)

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features)
        operands = (*self._operands(grid), bias)
        sizes = _sizes(grid)
        if self._directly(tokens.shape[0], x.dtype, grid, int8_activations):
            op = torch.ops.hfq.cpu_linear
            y = call(op, tokens.contiguous(), *operands, *sizes, int8_activations)
        else:
            op = torch.ops.hfq.cpu_linear_dequantized
            y = op(widened(tokens), *operands, *sizes).to(x.dtype)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features)
        return out

    def experts(
        self,
        x: Tensor,
        counts: Tensor,
        grid: PackedGrid,
        bias: Tensor | None,
        int8_activations: bool,
    ) -> Tensor:
        learns = torch.is_grad_enabled() and x.requires_grad
        if learns or not self._directly(int(counts.max()), x.dtype, grid, int8_activations):
            return super().experts(x, counts, grid, bias, int8_activations)
        y: Tensor = torch.ops.hfq.cpu_experts_linear(
            x.contiguous(),
            counts,
            *self._operands(grid),
            bias,
            *_sizes(grid),
            int8_activations,
        )
        return y

    def stack(self, grids: Sequence[PackedGrid]) -> tuple[PackedGrid, list[PackedGrid]] | None:
        return stack_tiles(grids, rows16.ROWS, rows16.stack)

    def lookup(self, grid: PackedGrid, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows: Tensor = torch.ops.hfq.cpu_lookup(
            index.long(), *self._operands(grid), *_sizes(grid), native_dtype(dtype)
        )
        return rows.to(dtype)

    def dequantize(self, grid: PackedGrid, dtype: torch.dtype) -> Tensor:
        return rows16_weight(self._operands(grid), _sizes(grid), dtype)

    def _directly(
        self, tokens: int, dtype: torch.dtype, grid: PackedGrid, int8_activations: bool
    ) -> bool:
        """Whether `cpu_linear` is the faster way."""
        if dtype == torch.float64:
            return (
                False  # the kernel computes in float32: too little for what nobody uses for speed
            )
        if tokens <= self.max_direct_tokens[int8_activations]:
            return True
        if not native.has_tiles():
            return int8_activations
        if not (int8_activations or dtype == torch.bfloat16):
            return False
        columns = _TILE_COLUMNS[int8_activations]
        return grid.group_size >= grid.in_features or grid.group_size % columns == 0

    def _operands(self, grid: PackedGrid) -> tuple[Tensor | None, ...]:
        return (grid.qweight, grid.scales, grid.zeros, grid.codebook)


def _sizes(grid: PackedGrid) -> tuple[int, int, int, int]:
    return (grid.bits, grid.group_size, grid.in_features, grid.out_features)


def no_native_code(problem: Problem) -> str | None:
    """Why native CPU code cannot run at all, or None."""
    if problem.device != "cpu":
        return f"runs on cpu, the weight is on {problem.device}"
    status = native.load()
    return None if status.cpu else f"native CPU kernels are not loaded: {status.cpu_reason}"


def call(op: Any, *arguments: Tensor | int | None) -> Tensor:
    """A native product (`ops.define_product`); where no gradient is wanted, the overload that has none."""
    # Forward-mode differentiation goes on under no_grad.
    wanted = torch.is_grad_enabled() or forward_ad._current_level >= 0
    y: Tensor = op.default(*arguments) if wanted else op.inference(*arguments)
    return y
