"""The kernel for 8-bit floats on both sides: PyTorch's scaled product on the tensor cores of NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.weight import Fp8Grid
from .fp8 import TILE
from .neutral_fp8 import NeutralFp8
from .row import Problem

__all__ = ["CudaFp8"]

# Products of E4M3 came with Ada; from 11 on the matrix library takes no scale per row (pytorch/pytorch#161236).
_FIRST, _BEYOND = (8, 9), (11, 0)


class CudaFp8(NeutralFp8):
    """`torch._scaled_mm` with a scale for each token and each output channel; reads the stored layout."""

    name = "cuda_fp8"

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


def _machine_reason() -> str | None:
    """Why the GPUs of this machine cannot run it, or None."""
    if torch.version.hip is not None:
        return "takes NVIDIA GPUs, this PyTorch is for AMD's"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    for major, minor in found:
        if not _FIRST <= (major, minor) < _BEYOND:
            return f"takes GPUs of compute capability 8.9 to 10, one here has {major}.{minor}"
    return None
