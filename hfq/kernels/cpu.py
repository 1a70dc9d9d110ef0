"""CPU kernels on the ``rows16`` layout: 4-bit integers and codebooks, 8-bit integers.

Few tokens: the packed weight is read directly (`cpu_linear`). Many tokens: dequantize into the dtype of x and let
the matrix library multiply, which costs one more pass over the weight and reuses it for all tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core.bits import packed_bytes
from ..core.weight import PackedGrid
from . import native, rows16
from .ops import rows16_weight
from .row import Problem

__all__ = ["MAX_DIRECT_TOKENS", "CpuRows16", "call", "no_native_code"]

# Up to here `cpu_linear` is faster than dequantizing (8192x2048 and 2048x8192 int4, 2 cores with AVX-512 VNNI and
# AMX, benchmarks/NOTES.md), by whether activations are quantized to int8.
MAX_DIRECT_TOKENS = {False: 32, True: 128}


class CpuRows16:
    """Native CPU kernels; see `kernels/cpu/`."""

    name = "cpu_rows16"

    def reject(self, problem: Problem) -> str | None:
        reason = no_native_code(problem)
        if reason is not None:
            return reason
        if problem.activation is not None:
            return f"takes float activations, this weight asks for int8 ({problem.activation})"
        if problem.bits not in (4, 8):
            return f"takes 4 and 8 bits, not {problem.bits}"
        if problem.has_g_idx:
            return "takes groups of neighbouring columns only, the weight has a g_idx"
        unit = 8 if problem.bits == 4 else 4
        if problem.group_size % unit and problem.group_size < problem.in_features:
            return f"takes group sizes that are multiples of {unit} at {problem.bits} bits, not {problem.group_size}"
        return None

    def prepare(self, tensor: Tensor) -> Tensor:
        return rows16.to_rows16(tensor)

    def restore(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return rows16.from_rows16(tensor, shape)

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features)
        operands = (grid.qweight, grid.scales, grid.zeros, grid.codebook, bias)
        sizes = (grid.bits, grid.group_size, grid.in_features, grid.out_features)
        # The direct kernel computes in float32: too little for float64, which nobody uses for speed.
        if tokens.shape[0] <= MAX_DIRECT_TOKENS[int8_activations] and x.dtype != torch.float64:
            op = torch.ops.hfq.cpu_linear
            y = call(op, tokens.contiguous(), *operands, *sizes, int8_activations)
        else:
            y = torch.ops.hfq.cpu_linear_dequantized(tokens, *operands, *sizes)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features)
        return out

    def rows(self, grid: PackedGrid, index: Tensor) -> PackedGrid:
        block, lane = index // rows16.ROWS, index % rows16.ROWS
        return replace(
            grid,
            qweight=rows16.pick_rows(
                grid.qweight, index, packed_bytes(grid.in_features, grid.bits)
            ),
            scales=grid.scales[block, :, lane],
            zeros=None if grid.zeros is None else grid.zeros[block, :, lane],
            out_features=index.shape[0],
        )

    def dequantize(self, grid: PackedGrid, dtype: torch.dtype) -> Tensor:
        operands = (grid.qweight, grid.scales, grid.zeros, grid.codebook)
        sizes = (grid.bits, grid.group_size, grid.in_features, grid.out_features)
        return rows16_weight(operands, sizes, dtype)


def no_native_code(problem: Problem) -> str | None:
    """Why native CPU code cannot run at all, or None."""
    if problem.device != "cpu":
        return f"runs on cpu, the weight is on {problem.device}"
    status = native.load()
    return None if status.cpu else f"native CPU kernels are not loaded: {status.cpu_reason}"


def call(op: Any, *arguments: Tensor | int | None) -> Tensor:
    """An operator; under `torch.no_grad` past the Python code of its gradient, half of the time of a small call."""
    if (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0  # forward-mode differentiation goes on under no_grad
        or torch.compiler.is_compiling()
    ):
        y: Tensor = op(*arguments)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        y = op.default(*arguments)
    return y
