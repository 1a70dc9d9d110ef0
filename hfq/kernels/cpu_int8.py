"""The CPU kernel for W8A8: activations quantized per token, products of integers, on the ``rows16`` layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.weight import PackedGrid
from .cpu import CpuRows16, call, no_native_code
from .int8 import MAX_COLUMNS
from .row import OneByOne, Problem

__all__ = ["CpuInt8"]


class CpuInt8(CpuRows16):
    """Native kernel for weights that ask for int8 activations; see `kernels/cpu/int8_body.h`."""

    name = "cpu_int8"

    def reject(self, problem: Problem) -> str | None:
        if problem.activation is None:
            return "takes int8 activations, this weight does not ask for them"
        if problem.in_features > MAX_COLUMNS:
            return f"takes up to {MAX_COLUMNS} columns, not {problem.in_features}"
        return no_native_code(problem)

    experts = OneByOne.experts
    stack = OneByOne.stack

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features).contiguous()
        if x.dtype == torch.float64:
            # The rule reads activations as float32 whatever they are.
            tokens = tokens.float()
            bias = None if bias is None else bias.float()
        y = call(
            torch.ops.hfq.cpu_int8_linear,
            tokens,
            grid.qweight,
            grid.scales,
            grid.input_scale,
            bias,
            grid.in_features,
            grid.out_features,
        )
        out: Tensor = y.view(*x.shape[:-1], grid.out_features).to(x.dtype)
        return out
