"""The CUDA kernels for W8A8: activations quantized per token, products of integers, on the ``signed`` layout.

    neutral   codes uint8 [..., N, K, 1]      signed   uint8 [..., N, C, 16, 1]

C = K / 16 pieces of 16 columns, one load of a thread. The bytes stand where they stood, with the upper bit changed, which is the
zero point 128: they are two's complement. Scales stay as they are. One layout serves both products. Rows are operands of tensor cores
as they lie (kernels/cuda/linear_w8a8_kernel.h), and what the matrix library takes. Layout fragments would have to be turned back for
each of its calls: a byte read and one written for each weight are 10 us for 4096 x 4096 of them on an H100, where the product takes
some 5 with 64 tokens and 100 with 4096. The bit is changed once and not in each call for the same reason: signed bytes
are all that the library takes, and no sum of activations makes up for bytes that wrap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.weight import PackedGrid
from . import fragments
from .cpu import call
from .cuda import most_expert_tokens, takes_all_experts
from .cuda_int8_ops import PIECE, signed_weight, switched
from .cuda_machine import no_native_code
from .int8 import MAX_COLUMNS
from .row import AllAtOnce, Problem, stack_tiles

__all__ = ["MAX_DIRECT_TOKENS", "CudaInt8"]

# The direct product takes up to 32 tokens for one read of the weight. Measured on an H200, 4096 x 14336: 16 tokens 23 us, 32 27, and 64 by
# `torch._int_mm`, which needs three kernels, 31.
MAX_DIRECT_TOKENS = 32


class CudaInt8(AllAtOnce):
    """Native CUDA kernels and `torch._int_mm` for weights that ask for int8 activations."""

    name = "cuda_int8"

    def reject(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"runs on cuda, the weight is on {problem.device}"
        if problem.activation is None:
            return "takes int8 activations, this weight does not ask for them"
        if problem.in_features % PIECE or not 0 < problem.in_features <= MAX_COLUMNS:
            return f"takes columns in multiples of {PIECE} up to {MAX_COLUMNS}, not {problem.in_features}"
        return no_native_code()

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        return switched(tensor).view(*tensor.shape[:-2], tensor.shape[-2] // PIECE, PIECE, 1)

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        return switched(tensor).view(shape)

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features).contiguous()
        if x.dtype == torch.float64:
            # The rule reads activations as float32 whatever they are.
            tokens = tokens.float()
            bias = None if bias is None else bias.float()
        arguments = (
            *(grid.qweight, grid.scales, grid.input_scale, bias),
            *(grid.in_features, grid.out_features),
        )
        if tokens.shape[0] <= MAX_DIRECT_TOKENS:
            y = call(torch.ops.hfq.cuda_int8_linear, tokens, *arguments)
        else:
            y = torch.ops.hfq.cuda_int8_linear_cublas(tokens, *arguments)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features).to(x.dtype)
        return out

    def all_experts(
        self, x: Tensor, counts: Tensor, grid: PackedGrid, bias: Tensor | None
    ) -> Tensor:
        operands = (grid.qweight, grid.scales, bias, grid.in_features, grid.out_features)
        y: Tensor = torch.ops.hfq.cuda_int8_experts_linear(x, counts, *operands)
        return y

    def reads_counts_on_device(self, x: Tensor, tokens: int, grid: PackedGrid) -> bool:
        # A static scale is that of an expert; tokens are rounded before anybody knows whose they are.
        known = grid.input_scale is None and x.dtype != torch.float64
        return known and takes_all_experts(x, tokens, grid, most_expert_tokens(grid))

    def stack(self, grids: Sequence[PackedGrid]) -> tuple[PackedGrid, list[PackedGrid]] | None:
        if any(grid.input_scale is not None for grid in grids):
            return None  # each has its own
        return stack_tiles(grids, 1, fragments.stack)

    def lookup(self, grid: PackedGrid, index: Tensor, dtype: torch.dtype) -> Tensor:
        return signed_weight(grid.qweight[index], grid.scales[index], dtype)

    def dequantize(self, grid: PackedGrid, dtype: torch.dtype) -> Tensor:
        return signed_weight(grid.qweight, grid.scales, dtype)
