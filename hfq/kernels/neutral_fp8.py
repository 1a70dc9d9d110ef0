"""The kernel that is always right for format ``fp8``: dequantize the stored layout, then multiply."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.weight import Fp8Grid
from . import fp8_ops  # noqa: F401  (defines torch.ops.hfq.fp8_*)
from .row import AsStored

__all__ = ["NeutralFp8"]


class NeutralFp8(AsStored):
    """Dequantize and multiply, any device and shape."""

    name = "dequantize_fp8"

    def linear(
        self, x: Tensor, grid: Fp8Grid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        operands = (grid.qweight, grid.scales, grid.input_scale)
        y: Tensor = torch.ops.hfq.fp8_linear(x, *operands, bias, grid.activation is not None)
        return y

    def lookup(self, grid: Fp8Grid, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows = replace(
            grid,
            qweight=grid.qweight[index],
            scales=grid.scales[index],
            out_features=index.shape[0],
        )
        return self.dequantize(rows, dtype)

    def dequantize(self, grid: Fp8Grid, dtype: torch.dtype) -> Tensor:
        weight: Tensor = torch.ops.hfq.fp8_dequantize(grid.qweight, grid.scales, dtype)
        return weight
