"""Kernels for 8-bit floats on NVIDIA GPUs.

With float activations weights are codes like those of integers, in layout ``fragments``, for any GPU that runs our kernels. With 8-bit floats
on both sides there are native products for few tokens and PyTorch's scaled product for many. Both read the stored layout: rows of E4M3 are
operands of tensor cores as they lie (kernels/cuda/linear_w8a8_kernel.h), and what the matrix library takes. The native products are those of
float16, so they run where the library has none of E4M3; it then multiplies many tokens in bfloat16, which holds each E4M3 as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.weight import Fp8Grid
from . import fragments
from .cpu import call
from .cuda import CudaFragments, most_expert_tokens, takes_all_experts
from .cuda_machine import no_native_code
from .fp8 import TILE
from .neutral_fp8 import NeutralFp8
from .row import AllAtOnce, Problem, stack_tiles

__all__ = [
    "MAX_DIRECT_TOKENS",
    "MAX_DIRECT_TOKENS_WIDENED",
    "CudaFp8",
    "CudaFp8Library",
    "CudaFp8Weights",
    "CudaFp8Widened",
]

# Products of E4M3 came with Ada; from 11 on the matrix library takes no scale per row (pytorch/pytorch#161236).
_FIRST, _BEYOND = (8, 9), (11, 0)

# The direct product takes up to 32 tokens for one read of the weight. Measured on an H200, 4096 x 14336: 16 tokens 23 us, 32 28, and 64 by
# `torch._scaled_mm` 26.
MAX_DIRECT_TOKENS = 32

# Where more tokens meet a dequantized weight: that is a byte read, two written and two read for each weight, and the direct product reads one byte
# for every 32 tokens. Not measured.
MAX_DIRECT_TOKENS_WIDENED = 128

# What the kernels take (kernels/cuda/w8a8.h).
_MOST_COLUMNS = 1 << 26


class CudaFp8Weights(CudaFragments):
    """Weights only: `CudaFragments` for codes that are E4M3."""

    name = "cuda_fp8_weights"

    def _operands(self, grid: Any) -> tuple[Tensor | None, ...]:
        return (grid.qweight, grid.scales, None, grid.values)


class CudaFp8Library(NeutralFp8):
    """`torch._scaled_mm` with a scale for each token and each output channel; needs no native code of hfq."""

    name = "cuda_fp8_library"

    def reject(self, problem: Problem) -> str | None:
        reason = _weight_reason(problem)
        if reason is not None:
            return reason
        if problem.out_features % TILE or problem.in_features % TILE or not problem.in_features:
            return (
                f"takes rows and columns in multiples of {TILE}, not {problem.out_features} x "
                f"{problem.in_features}"
            )
        return _machine_reason()

    def linear(
        self, x: Tensor, grid: Fp8Grid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        if x.dtype not in (torch.bfloat16, torch.float16):
            # The product's bfloat16 would be all that is left of what was to be exact.
            return super().linear(x, grid, bias, int8_activations)
        operands = (grid.qweight, grid.scales, grid.input_scale)
        y: Tensor = torch.ops.hfq.fp8_scaled_linear(x, *operands, bias)
        return y

    def stack(self, grids: Sequence[Fp8Grid]) -> tuple[Fp8Grid, list[Fp8Grid]] | None:
        if any(grid.input_scale is not None for grid in grids):
            return None  # each has its own
        return stack_tiles(grids, 1, fragments.stack)


class CudaFp8(AllAtOnce, CudaFp8Library):
    """Native CUDA kernels: few tokens are multiplied by them, many rounded by one and left to `torch._scaled_mm`."""

    name = "cuda_fp8"
    max_direct_tokens = MAX_DIRECT_TOKENS

    def reject(self, problem: Problem) -> str | None:
        return super().reject(problem) or _native_reason(problem)

    def linear(
        self, x: Tensor, grid: Fp8Grid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features)
        if x.dtype == torch.float64 or tokens.shape[0] > self.max_direct_tokens:
            return self.many_tokens(x, grid, bias)
        operands = (grid.qweight, grid.scales, grid.input_scale)
        y = call(torch.ops.hfq.cuda_fp8_linear, tokens.contiguous(), *operands, bias)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features)
        return out

    def many_tokens(self, x: Tensor, grid: Fp8Grid, bias: Tensor | None) -> Tensor:
        """`linear` for what the direct product does not take."""
        return super().linear(x, grid, bias, False)

    def all_experts(self, x: Tensor, counts: Tensor, grid: Fp8Grid, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.hfq.cuda_fp8_experts_linear(
            x, counts, grid.qweight, grid.scales, bias
        )
        return y

    def reads_counts_on_device(self, x: Tensor, tokens: int, grid: Fp8Grid) -> bool:
        # A static scale is that of an expert; tokens are rounded before anybody knows whose they are.
        known = grid.input_scale is None and x.dtype != torch.float64
        return known and takes_all_experts(x, tokens, grid, most_expert_tokens(grid))


class CudaFp8Widened(CudaFp8):
    """What `CudaFp8` does, on any GPU that runs our kernels and for any shape: many tokens are multiplied in bfloat16.

    Rows are stored in whole `TILE` of columns, those behind K zero; where K is a multiple that is the neutral layout:

        neutral   codes uint8 [..., N, K, 1]      padded   uint8 [..., N, ceil(K / 16), 16, 1]
    """

    name = "cuda_fp8_widened"
    max_direct_tokens = MAX_DIRECT_TOKENS_WIDENED

    def reject(self, problem: Problem) -> str | None:
        return _weight_reason(problem) or _native_reason(problem)

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        if tensor.dtype != torch.uint8 or tensor.shape[-2] % TILE == 0:
            return tensor
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[-2] % TILE))
        return padded.view(*tensor.shape[:-2], -1, TILE, 1)

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        return tensor.flatten(-3, -2)[..., : shape[-2], :].contiguous()

    def linear(
        self, x: Tensor, grid: Fp8Grid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        return super().linear(_padded_tokens(x), _padded(grid), bias, int8_activations)

    def many_tokens(self, x: Tensor, grid: Fp8Grid, bias: Tensor | None) -> Tensor:
        operands = (grid.qweight, grid.scales, grid.input_scale)
        y: Tensor = torch.ops.hfq.fp8_widened_linear(x, *operands, bias)
        return y

    def all_experts(self, x: Tensor, counts: Tensor, grid: Fp8Grid, bias: Tensor | None) -> Tensor:
        return super().all_experts(_padded_tokens(x), counts, _padded(grid), bias)

    def lookup(self, grid: Fp8Grid, index: Tensor, dtype: torch.dtype) -> Tensor:
        return super().lookup(_padded(grid), index, dtype)[..., : grid.in_features].contiguous()

    def dequantize(self, grid: Fp8Grid, dtype: torch.dtype) -> Tensor:
        return super().dequantize(_padded(grid), dtype)[..., : grid.in_features].contiguous()


def _padded(grid: Fp8Grid) -> Fp8Grid:
    """A grid in the layout of `CudaFp8Widened` as one with so many columns as there are in memory."""
    missing = -grid.in_features % TILE
    if not missing:
        return grid
    qweight = grid.qweight.flatten(-3, -2)
    return replace(grid, qweight=qweight, in_features=grid.in_features + missing)


def _padded_tokens(x: Tensor) -> Tensor:
    """Zeros change no token's scale, and meet weights of zero."""
    missing = -x.shape[-1] % TILE
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _weight_reason(problem: Problem) -> str | None:
    """Why products of 8-bit floats are not for this weight, or None."""
    if problem.device != "cuda":
        return f"runs on cuda, the weight is on {problem.device}"
    if problem.activation is None:
        return "takes fp8 activations, this weight does not ask for them"
    return None


def _native_reason(problem: Problem) -> str | None:
    """Why the native kernels do not take this weight, or None."""
    if not 0 < problem.in_features <= _MOST_COLUMNS:
        return f"takes up to {_MOST_COLUMNS} columns, not {problem.in_features}"
    return no_native_code()


def _machine_reason() -> str | None:
    """Why the GPUs of this machine cannot run it, or None."""
    if torch.version.hip is not None:
        return "takes NVIDIA GPUs, this PyTorch is for AMD's"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    for major, minor in found:
        if not _FIRST <= (major, minor) < _BEYOND:
            return f"takes GPUs of compute capability 8.9 to 10, one here has {major}.{minor}"
    return None
