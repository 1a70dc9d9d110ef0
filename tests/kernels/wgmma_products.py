"""Products of compute capability 9.0 in the emulator: what tests of the kernels with wgmma share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Multiprocessors: one block for all columns, clusters of up to eight.
ALONE, CLUSTERS = 1, 1 << 20


def linear(
    emulator: Any, x: Tensor, weight: Any, bias: Tensor | None = None, multiprocessors: int = ALONE
) -> Tensor:
    y: Tensor = emulator.linear(
        x, weight.operands, bias, weight.sizes, multiprocessors, capability=90
    )
    return y
