"""The kernel that is always right: dequantize the stored layout, then multiply. Any device, format and shape.

On CUDA the dequantization runs in a kernel of ours where that was built; elsewhere it is PyTorch. Weights with int8
activations are multiplied as integers (`hfq.kernels.int8`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.weight import PackedGrid
from . import ops  # noqa: F401  (defines torch.ops.hfq)
from .row import AsStored

__all__ = ["Neutral"]


class Neutral(AsStored):
    """Dequantize and multiply."""

    name = "dequantize"

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        if grid.activation is not None:
            out: Tensor = torch.ops.hfq.int8_linear(
                x, grid.qweight, grid.scales, grid.input_scale, bias, grid.in_features
            )
            return out
        y: Tensor = torch.ops.hfq.linear(
            x,
            grid.qweight,
            grid.scales,
            grid.zeros,
            grid.codebook,
            grid.g_idx,
            bias,
            grid.bits,
            grid.group_size,
            grid.in_features,
        )
        return y

    def lookup(self, grid: PackedGrid, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows = replace(
            grid,
            qweight=grid.qweight[index],
            scales=grid.scales[index],
            zeros=None if grid.zeros is None else grid.zeros[index],
            out_features=index.shape[0],
        )
        return self.dequantize(rows, dtype)

    def dequantize(self, grid: PackedGrid, dtype: torch.dtype) -> Tensor:
        weight: Tensor = torch.ops.hfq.dequantize(
            grid.qweight,
            grid.scales,
            grid.zeros,
            grid.codebook,
            grid.g_idx,
            grid.bits,
            grid.group_size,
            grid.in_features,
            dtype,
        )
        return weight
