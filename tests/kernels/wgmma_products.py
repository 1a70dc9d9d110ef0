"""Products of compute capability 9.0 in the emulator: what tests of the kernels with wgmma share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Multiprocessors: one block for all columns, clusters of up to eight.
ALONE, CLUSTERS = 1, 1 << 20
CHUNK = 128  # columns


def linear(
    emulator: Any, x: Tensor, weight: Any, bias: Tensor | None = None, multiprocessors: int = ALONE
) -> Tensor:
    y: Tensor = emulator.linear(
        x, weight.operands, bias, weight.sizes, multiprocessors, capability=90
    )
    return y


def arranged(x: Tensor, tile: int) -> Tensor:
    """Numbers `[M, K]` in the order that wgmma_block.h describes, in tiles of so many tokens."""
    tokens, columns = -len(x) % tile, -x.shape[1] % CHUNK
    whole = torch.nn.functional.pad(x, (0, columns, 0, tokens))
    # A word of two numbers is word 4t + i of a unit, and goes to place t of piece i.
    words = whole.view(-1, tile, whole.shape[1] // CHUNK, 2, 2, 4, 4, 2)
    pieces = words.permute(0, 2, 3, 1, 4, 6, 5, 7).reshape(-1, tile, 8, 8)
    row, place = torch.arange(tile)[:, None], torch.arange(8)
    return pieces[:, row, place ^ row % 8].flatten()


def arranged_floats(tokens: int, columns: int, tile: int) -> int:
    """Of the workspace for it: 16-bit numbers of whole tiles and chunks."""
    return -(-tokens // tile) * tile * -(-columns // CHUNK) * CHUNK // 2
