"""Products of compute capability 9.0 in the emulator: what tests of the kernels with wgmma share."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import torch
from fragments_weights import random_weight
from torch import Tensor

# Multiprocessors: one range of all chunks, or as many as there are chunks.
ALONE, CLUSTERS = 1, 1 << 20
PAIR = 2  # for one pair
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


# (tile, first chunk, chunks), of one range of wgmma_ranges.h
Segments = list[tuple[int, int, int]]


def ranges_of(
    emulator: Any,
    tokens: int,
    rows: int,
    columns: int,
    clusters: int,
    blocks: int | None = None,
) -> list[Segments]:
    """What each range has of the tiles, by the plan; all of each tile, once."""
    shape, plan = emulator.range_plan(tokens, (4, 0, columns, rows), clusters, blocks)
    chunks, tiles = -(-columns // CHUNK), -(-rows // shape.rows) * -(-tokens // shape.tokens)
    assert plan.tile_units * plan.unit_chunks == chunks
    assert plan.units == tiles * plan.tile_units
    assert 0 < plan.ranges <= clusters and plan.units * plan.ranges < 1 << 32
    ends = [r * plan.units // plan.ranges * plan.unit_chunks for r in range(plan.ranges + 1)]
    found = []
    for begin, end in itertools.pairwise(ends):
        assert begin < end
        segments = []
        while begin < end:
            count = min(end - begin, chunks - begin % chunks)
            segments.append((begin // chunks, begin % chunks, count))
            begin += count
        found.append(segments)
    assert sum(count for segments in found for _, _, count in segments) == tiles * chunks
    return found


def contributors(ranges: list[Segments]) -> collections.Counter[int]:
    """Ranges of each tile."""
    return collections.Counter(tile for segments in ranges for tile, _, _ in segments)


def check_cut(
    emulator: Any,
    generator: torch.Generator,
    product: tuple[int, int, int, int],
    segments: int,
    shared: int,
    *,
    blocks: int,
    group_size: int,
    dtype: torch.dtype,
    rounded: bool = False,
) -> Any:
    """Results are right and the same each time, whoever adds them up. Returns the shape of a cluster.

    Args:
        product: tokens, N, K, clusters that run at a time.
        segments, shared: of a range, and ranges of a tile, at most.
        blocks: of a cluster.
        rounded: weights are, to 16 bits.
    """
    tokens, rows, columns, clusters = product
    shape, _ = emulator.range_plan(tokens, (4, 0, columns, rows), clusters, blocks)
    assert shape.blocks == blocks
    ranges = ranges_of(emulator, tokens, rows, columns, clusters, blocks)
    assert max(map(len, ranges)) == segments
    assert max(contributors(ranges).values()) == shared
    w = random_weight(generator, (rows, columns, group_size), (4, None))
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator)
    y = linear(emulator, x, w, bias, blocks * clusters)
    w.check(y, x, bias, rounded=rounded)
    assert torch.equal(y, linear(emulator, x, w, bias, blocks * clusters))
    alone = linear(emulator, x, w, bias, blocks)
    tiles = -(-tokens // shape.tokens)
    for tile, count in contributors(ranges).items():
        if count == 1:  # else sums are in another order
            m, n = tile % tiles * shape.tokens, tile // tiles * shape.rows
            own = slice(m, m + shape.tokens), slice(n, n + shape.rows)
            assert torch.equal(y[own], alone[own])
    assert torch.equal(y, alone) == (shared == 1)
    return shape
