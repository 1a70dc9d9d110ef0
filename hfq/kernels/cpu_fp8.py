"""The CPU kernels for 8-bit floats, on the ``rows16`` layout: E4M3 is one more kind of codes there, with one group per row.

Activations are as they come, or rounded to E4M3 by the rule of `hfq.core.activations`. Those go through an operator of their own, for any
number of tokens where there are matrix units, whose bfloat16 holds each E4M3; elsewhere many tokens are rounded natively and
multiplied by the matrix library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import fp8_ops, native  # noqa: F401  (defines torch.ops.hfq.cpu_fp8_*)
from .cpu import CpuRows16, call, no_native_code
from .row import OneByOne, Problem

__all__ = ["MAX_DIRECT_TOKENS", "CpuFp8"]

# Up to here the kernels are faster than dequantizing where there are no matrix units. Milliseconds, 4096 x 4096, one thread with AVX-512: 64 tokens 20
# directly, 25 dequantized; 128 tokens 41 and 38.
MAX_DIRECT_TOKENS = 64


class CpuFp8(CpuRows16):
    """Native kernels for weights in E4M3; see `kernels/cpu/e4m3_body.h`."""

    name = "cpu_fp8"
    max_direct_tokens: ClassVar[Mapping[bool, int]] = {False: MAX_DIRECT_TOKENS}

    def reject(self, problem: Problem) -> str | None:
        if not problem.in_features:
            return "takes weights with columns, not without any"
        return no_native_code(problem)

    def linear(self, x: Tensor, grid: Any, bias: Tensor | None, int8_activations: bool) -> Tensor:
        if grid.activation is None:
            return super().linear(x, grid, bias, False)
        tokens = x.reshape(-1, grid.in_features).contiguous()
        if x.dtype == torch.float64:
            # The rule reads activations as float32 whatever they are.
            tokens = tokens.float()
            bias = None if bias is None else bias.float()
        operands = (grid.qweight, grid.scales, grid.values, grid.input_scale, bias)
        sizes = (grid.in_features, grid.out_features)
        if tokens.shape[0] <= MAX_DIRECT_TOKENS or native.has_tiles():
            y = call(torch.ops.hfq.cpu_fp8_linear, tokens, *operands, *sizes)
        else:
            y = torch.ops.hfq.cpu_fp8_linear_dequantized(tokens, *operands, *sizes)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features).to(x.dtype)
        return out

    def experts(
        self, x: Tensor, counts: Tensor, grid: Any, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        if grid.activation is not None:
            return OneByOne.experts(self, x, counts, grid, bias, False)
        return super().experts(x, counts, grid, bias, False)

    def stack(self, grids: Sequence[Any]) -> tuple[Any, list[Any]] | None:
        if any(grid.input_scale is not None for grid in grids):
            return None  # each has its own
        return super().stack(grids)

    def _operands(self, grid: Any) -> tuple[Tensor | None, ...]:
        return (grid.qweight, grid.scales, None, grid.values)
