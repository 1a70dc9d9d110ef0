"""Kernels for 8-bit floats on NVIDIA GPUs.

With float activations weights are codes like those of integers, in layout ``fragments``, for any GPU that runs our kernels. With 8-bit floats
on both sides there are native products for few tokens and PyTorch's scaled product for many. Both read the stored layout: rows of E4M3 are
operands of tensor cores as they lie (kernels/cuda/linear_w8a8_kernel.h), and what the matrix library takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.weight import Fp8Grid
from . import fragments
from .cpu import call
from .cuda import CudaFragments, most_expert_tokens, no_native_code, takes_all_experts
from .fp8 import TILE
from .neutral_fp8 import NeutralFp8
from .row import AllAtOnce, Problem, stack_tiles

__all__ = ["MAX_DIRECT_TOKENS", "CudaFp8", "CudaFp8Library", "CudaFp8Weights"]

# Products of E4M3 came with Ada; from 11 on the matrix library takes no scale per row (pytorch/pytorch#161236).
_FIRST, _BEYOND = (8, 9), (11, 0)

# The direct product takes up to 32 tokens for one read of the weight. Measured on an H200, 4096 x 14336: 16 tokens 23 us, 32 28, and 64 by
# `torch._scaled_mm` 26.
MAX_DIRECT_TOKENS = 32

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
        if problem.device != "cuda":
            return f"runs on cuda, the weight is on {problem.device}"
        if problem.activation is None:
            return "takes fp8 activations, this weight does not ask for them"
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
        return stack_tiles(grids, TILE, fragments.stack)


class CudaFp8(AllAtOnce, CudaFp8Library):
    """Native CUDA kernels: few tokens are multiplied by them, many rounded by one and left to `torch._scaled_mm`."""

    name = "cuda_fp8"

    def reject(self, problem: Problem) -> str | None:
        reason = super().reject(problem)
        if reason is not None:
            return reason
        if problem.in_features > _MOST_COLUMNS:
            return f"takes up to {_MOST_COLUMNS} columns, not {problem.in_features}"
        return no_native_code()

    def linear(
        self, x: Tensor, grid: Fp8Grid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features)
        if x.dtype == torch.float64 or tokens.shape[0] > MAX_DIRECT_TOKENS:
            return super().linear(x, grid, bias, int8_activations)
        operands = (grid.qweight, grid.scales, grid.input_scale)
        y = call(torch.ops.hfq.cuda_fp8_linear, tokens.contiguous(), *operands, bias)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features)
        return out

    def all_experts(self, x: Tensor, counts: Tensor, grid: Fp8Grid, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.hfq.cuda_fp8_experts_linear(
            x, counts, grid.qweight, grid.scales, bias
        )
        return y

    def reads_counts_on_device(self, x: Tensor, tokens: int, grid: Fp8Grid) -> bool:
        # A static scale is that of an expert; tokens are rounded before anybody knows whose they are.
        known = grid.input_scale is None and x.dtype != torch.float64
        return known and takes_all_experts(x, tokens, grid, most_expert_tokens(grid))


def _machine_reason() -> str | None:
    """Why the GPUs of this machine cannot run it, or None."""
    if torch.version.hip is not None:
        return "takes NVIDIA GPUs, this PyTorch is for AMD's"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    for major, minor in found:
        if not _FIRST <= (major, minor) < _BEYOND:
            return f"takes GPUs of compute capability 8.9 to 10, one here has {major}.{minor}"
    return None
