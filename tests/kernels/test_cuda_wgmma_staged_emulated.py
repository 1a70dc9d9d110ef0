"""Up to 64 tokens at a time with x put in order where it lies in shared memory (wgmma_staged.h), run on the CPU, against a float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import (
    check_activations_of_size,
    check_bad_passes_through_partial_sums,
    check_dtypes,
    check_only_bad,
    check_tokens_are_apart,
)
from torch import Tensor
from wgmma_products import ALONE, CLUSTERS, check_cut, contributors, linear, ranges_of

# (N, K, group_size; 0: one group per row): rows that fill no tile, warpgroup or block; columns that end in a chunk, in each of its units, and that turn
# the ring of stages around more than once; groups of all kinds.
SHAPES = (
    (1, 8, 0),
    (17, 136, 32),
    (70, 264, 64),
    (130, 1328, 128),
    (33, 200, 0),
    (272, 392, 160),
    pytest.param((5, 2280, 96), marks=pytest.mark.slow),
    pytest.param((300, 2048, 128), marks=pytest.mark.slow),
)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "1")
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype, multiprocessors in zip(
        (*HALVES, *HALVES, *HALVES),
        (17, 32, 40, 64, 14, 9),
        (*FLOATS, *FLOATS),
        (ALONE, CLUSTERS, CLUSTERS, ALONE, ALONE, CLUSTERS),
        strict=True,
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias)


@pytest.mark.parametrize(
    "tokens", [9, 15, 16, 17, 18, 24, 25, 31, 32, 33, 39, 40, 47, 48, 49, 63, 64]
)
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's: neither on those that exist nor on memory where none is."""
    for extra in (None, "zeros"):
        w = make(generator, (76, 648, 128), (4, extra))
        x = torch.randn(tokens, 648, generator=generator).bfloat16()
        check_tokens_are_apart(lambda x, w=w: linear(emulator, x, w), w, x, generator)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_tiles_of_tokens(emulator: Any, generator: torch.Generator, kind: Kind) -> None:
    """More than 64 float16 tokens with a number of columns that pairs do not take."""
    for tokens, blocks in ((65, ALONE), (130, 4), (200, CLUSTERS)):
        w = make(generator, (140, 520, 64), kind)
        x = torch.randn(tokens, 520, generator=generator).half()
        bias = torch.randn(140, generator=generator)
        w.check(linear(emulator, x, w, bias, blocks), x, bias)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    generator: torch.Generator,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    def product(x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
        return linear(emulator, x, w, bias)

    check_dtypes(product, 12, scale_dtype, bias_dtype, generator)


# ---- ranges of all chunks


@pytest.mark.parametrize(
    ("rows", "columns", "tile", "ranges", "most", "shared"),
    [
        # Shapes of Llama 3 8B and 70B. Rows of a block, chunks of a range at most, and ranges of a tile.
        (14336, 4096, 256, 128, 14, 4),
        (4096, 14336, 128, 128, 28, 4),
        (28672, 8192, 256, 131, 55, 3),
        (4096, 4096, 128, 128, 8, 4),
        (1024, 4096, 128, 32, 8, 4),
    ],
)
def test_plans_of_an_h200(
    emulator: Any, rows: int, columns: int, tile: int, ranges: int, most: int, shared: int
) -> None:
    """132 blocks run at a time."""
    shape, _ = emulator.range_plan(64, (4, 0, columns, rows), 132)
    assert (shape.rows, shape.tokens, shape.blocks) == (tile, 64, 1)
    found = ranges_of(emulator, 64, rows, columns, 132)
    assert len(found) == ranges
    assert max(sum(count for _, _, count in segments) for segments in found) == most
    assert max(contributors(found).values()) == shared


@pytest.mark.parametrize(
    ("rows", "columns", "most"), [(14336, 4096, 28), (4096, 14336, 28), (4096, 4096, 8)]
)
def test_few_tokens_leave_no_multiprocessor_free(
    emulator: Any, rows: int, columns: int, most: int
) -> None:
    """Two blocks find room on one: two of the next kernel's would crowd there."""
    found = ranges_of(emulator, 16, rows, columns, 132)
    assert len(found) == 132
    assert max(sum(count for _, _, count in segments) for segments in found) == most


# (tokens, N, K, blocks), and what is new: rows of a block; segments of a range, ranges of a tile, at most.
CUTS = {
    "two_ranges": ((20, 130, 2000, 4), 128, 1, 2),
    "four_ranges": ((60, 100, 3848, 5), 128, 1, 4),
    "begin_and_end_within": ((64, 600, 1896, 4), 128, 2, 2),
    "within_one_tile": ((33, 500, 3816, 5), 256, 2, 3),
    "within_one_tile_32": ((24, 500, 3816, 5), 256, 2, 3),
    "whole_tiles_between": ((64, 1540, 640, 3), 256, 3, 2),
    "whole_tiles_between_32": ((30, 1540, 640, 5), 256, 3, 2),
    "all_of_one": ((60, 600, 392, 1), 128, 5, 1),
    "whole_tiles": ((40, 520, 2600, 5), 128, 1, 1),
}


@pytest.mark.parametrize("name", CUTS)
def test_every_cut(emulator: Any, generator: torch.Generator, name: str) -> None:
    product, of_block, segments, shared = CUTS[name]
    shape = check_cut(
        emulator, generator, product, segments, shared, blocks=1, group_size=128, dtype=torch.half
    )
    assert shape.rows == of_block


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_kind_in_ranges(emulator: Any, generator: torch.Generator, kind: Kind) -> None:
    """Scales and codes of segments that begin within groups and tiles."""
    for shape, tokens, blocks in (((600, 1896, 160), 30, 4), ((1540, 640, 96), 25, 5)):
        ranges = ranges_of(emulator, tokens, shape[0], shape[1], blocks)
        assert any(first for segments in ranges for _, first, _ in segments)
        w = make(generator, shape, kind)
        x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
        w.check(linear(emulator, x, w, multiprocessors=blocks), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_passes_through_partial_sums(
    emulator: Any, generator: torch.Generator, bad: float
) -> None:
    def product(x: Tensor, w: Any) -> Tensor:
        return linear(emulator, x, w, multiprocessors=7)

    check_bad_passes_through_partial_sums(product, 20, bad, generator)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", [(4, None), (4, "zeros"), (2, None)], ids=name_of)
def test_scales(
    emulator: Any,
    generator: torch.Generator,
    kind: Kind,
    group_size: int,
    scale_dtype: torch.dtype,
) -> None:
    for tokens, dtype in zip((24, 37, 13), (*HALVES, torch.bfloat16), strict=True):
        w = make(generator, (40, 1000, group_size), kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, 1000, generator=generator).to(dtype)
        w.check(linear(emulator, x, w), x)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    w = make(generator, (20, 136, 128), kind)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = torch.randn(39, 136, generator=generator).to(dtype)
        x[11, column] = bad
        check_only_bad(linear(emulator, x, w), 11)
    for tokens in (19, 10):
        x = torch.randn(tokens, 136, generator=generator).bfloat16()
        check_only_bad(linear(emulator, x, w.with_bad_scale(13, 1), multiprocessors=CLUSTERS).T, 13)
        x[tokens - 2, 70] = bad
        check_only_bad(linear(emulator, x, w), tokens - 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [-60, -30, 0, 30, 55])
def test_activations_of_any_size(
    emulator: Any, generator: torch.Generator, bits: int, power: int
) -> None:
    w = make(generator, (40, 520, 128), (bits, None), scale_dtype=torch.float32)

    def product(x: Tensor) -> Tensor:
        return linear(emulator, x.repeat(16, 1), w)[5:6]

    check_activations_of_size(product, w, power, generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 256, 0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_combination(
    emulator: Any, generator: torch.Generator, kind: Kind, group_size: int, dtype: torch.dtype
) -> None:
    cases = (((40, 1000), ALONE, (27, 50)), ((17, 1608), CLUSTERS, (33, 64)))
    for (rows, columns), multiprocessors, numbers in cases:
        w = make(generator, (rows, columns, group_size), kind)
        for tokens in numbers:
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            bias = torch.randn(rows, generator=generator) if tokens % 2 else None
            w.check(linear(emulator, x, w, bias, multiprocessors), x, bias)
