"""Pairs of thread blocks that share x, up to 256 tokens of it at a time (wgmma_pair.h), run on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import (
    check_bad_passes_through_partial_sums,
    check_only_bad,
    check_tokens_are_apart,
)
from torch import Tensor
from wgmma_products import (
    CLUSTERS,
    PAIR,
    arranged_floats,
    check_cut,
    contributors,
    linear,
    ranges_of,
)

# (N, K, group_size; 0: one group per row): rows that fill no tile or block, pairs whose second block has some or none; columns that end in a chunk;
# groups of all kinds.
SHAPES = (
    (1, 8, 0),
    (17, 136, 32),
    (128, 264, 64),
    (270, 520, 128),
    (133, 200, 0),
    pytest.param((5, 1096, 96), marks=pytest.mark.slow),
    pytest.param((400, 392, 160), marks=pytest.mark.slow),
)
TILE = 256  # tokens of a stage, of more than 128


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "pairs")


# ---- which products


def test_the_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 64 tokens; in float16 only of whole stages. Outputs for ones and zeros tell whether weights were rounded."""
    for columns, wanted in itertools.product((256, 136), ("1", "pairs")):
        monkeypatch.setenv("HFQ_CUDA_WGMMA", wanted)
        w = make(generator, (20, columns, 0), (8, None), scale_dtype=torch.float32)
        for tokens, dtype in itertools.product((64, 65, 128, 129), HALVES):
            x = torch.zeros(tokens, columns, dtype=dtype)
            x[:, :2] = 1
            exact = (w.values * w.scales)[:, :2].sum(1).to(dtype)
            y = linear(emulator, x, w, multiprocessors=PAIR)
            pair = tokens > 64 and (columns == 256 or dtype == torch.bfloat16 or wanted == "pairs")
            assert torch.equal(y, exact.expand(tokens, -1)) == (not pair), (tokens, dtype)


@pytest.mark.parametrize(("tokens", "tile"), [(65, 128), (128, 128), (129, 256), (300, 256)])
def test_workspace(emulator: Any, tokens: int, tile: int) -> None:
    """x in order; of one range flags, in lines, and partial sums. (One that is too small is an error of the emulator.)"""
    found = emulator.workspace(tokens, (4, 128, 4104, 8192), 90, multiprocessors=PAIR)
    assert found == arranged_floats(tokens, 4104, tile) + 32 + 256 * tile


# ---- products


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype, multiprocessors in zip(
        (*HALVES, *HALVES),
        (129, 257, 65, 128),
        (torch.float16, torch.float32, torch.float32, torch.bfloat16),
        (CLUSTERS, PAIR, PAIR, CLUSTERS),
        strict=True,
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias, rounded=True)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dtypes(
    emulator: Any, generator: torch.Generator, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    for kind, bias_dtype in (((4, None), torch.float32), ((3, "zeros"), torch.bfloat16)):
        w = make(generator, (276, 264, 32), kind, scale_dtype=scale_dtype)
        bias = torch.randn(276, generator=generator).to(bias_dtype)
        for tokens in (70, 150):
            x = torch.randn(tokens, 264, generator=generator).to(dtype)
            w.check(linear(emulator, x, w, bias, CLUSTERS), x, bias, rounded=True)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_results_are_those_of_fewer_tokens(
    emulator: Any, generator: torch.Generator, kind: Kind
) -> None:
    """To the bit, where nobody shares columns: the same weights, added in the same order."""
    for dtype in HALVES:
        w = make(generator, (140, 264, 64), kind)
        x = torch.randn(130, 264, generator=generator).to(dtype)
        y = linear(emulator, x, w, multiprocessors=PAIR)
        assert torch.equal(y[:128], linear(emulator, x[:128], w, multiprocessors=PAIR))


@pytest.mark.parametrize(
    "tokens", [65, 66, 72, 100, 127, 128, 129, 200, 255, 256, 257, 384, 600, 1024]
)
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's."""
    for extra in (None, "zeros"):
        w = make(generator, (140, 392, 64), (4, extra))
        x = torch.randn(tokens, 392, generator=generator).bfloat16()
        check_tokens_are_apart(
            lambda x, w=w: linear(emulator, x, w, multiprocessors=PAIR),
            w,
            x,
            generator,
            rounded=True,
        )


def test_each_stage_is_used_many_times(emulator: Any, generator: torch.Generator) -> None:
    for kind in ((2, None), (3, None), (4, None), (8, "zeros"), (4, "nf4")):
        w = make(generator, (40, 27 * 128 + 72, 128), kind)
        for tokens in (70, 130):
            x = torch.randn(tokens, w.sizes[2], generator=generator).bfloat16()
            w.check(linear(emulator, x, w, multiprocessors=PAIR), x, rounded=True)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    for dtype, scale_dtype, column in (
        *((dtype, dtype, 135) for dtype in HALVES),
        (torch.bfloat16, torch.float16, 3),
    ):
        w = make(generator, (140, 136, 64), kind, scale_dtype=scale_dtype)
        x = torch.randn(150, 136, generator=generator).to(dtype)
        x[141, column] = bad
        check_only_bad(linear(emulator, x, w, multiprocessors=PAIR), 141)
        x[141, column] = 0
        check_only_bad(linear(emulator, x, w.with_bad_scale(133, 1), multiprocessors=PAIR).T, 133)


# ---- ranges of all chunks


@pytest.mark.parametrize(
    ("rows", "columns", "ranges", "most", "shared"),
    [
        # Shapes of Llama 3 8B and 70B. Chunks of a range at most, and ranges of a tile.
        (14336, 4096, 64, 28, 2),
        (4096, 14336, 64, 28, 4),
        (28672, 8192, 66, 109, 2),
        (4096, 4096, 64, 8, 4),
    ],
)
def test_plans_of_an_h200(
    emulator: Any, rows: int, columns: int, ranges: int, most: int, shared: int
) -> None:
    """66 pairs run at a time."""
    found = ranges_of(emulator, 256, rows, columns, 66)
    assert len(found) == ranges
    assert max(sum(count for _, _, count in segments) for segments in found) == most
    assert max(contributors(found).values()) == shared


def test_plans_without_shared_tiles(emulator: Any) -> None:
    assert emulator.range_plan(256, (4, 0, 4096, 4096), 0)[1].ranges == 0
    # As many tiles as pairs, or more tiles than numbers of 32 bits have chunks for.
    for tokens, rows, columns in ((256, 66 * 256, 4096), (1 << 20, 1 << 18, 1 << 15)):
        _, ranges = emulator.range_plan(tokens, (4, 0, columns, rows), 66)
        assert (ranges.tile_units, ranges.unit_chunks) == (1, columns // 128)
    assert len(ranges_of(emulator, 200, 100, 1000, 1 << 19)) <= 8


def test_quotients(emulator: Any, generator: torch.Generator) -> None:
    most = (1 << 32) - 1
    bits = torch.randint(0, 33, (2, 20000), generator=generator)
    numbers = (torch.rand(2, 20000, generator=generator, dtype=torch.float64) * 2.0**bits).long()
    divisors = (1, 2, 3, 7, 132, 1 << 16, (1 << 16) + 1, 1 << 31, most - 1, most)
    near = [(d * k + e, d) for d in divisors for k in (1, 2, most // d) for e in (-1, 0, 1)]
    for n, divisor in (*numbers.clamp(max=most).T.tolist(), *near, *((most, d) for d in divisors)):
        if 0 <= n <= most and divisor > 0:
            assert emulator.quotient(n, divisor) == n // divisor


# (tokens, N, K, pairs), and what is new: segments of a range, ranges of a tile, at most.
CUTS = {
    "two_ranges": ((150, 230, 1608, 2), 1, 2),
    "three_ranges": ((256, 256, 1536, 3), 1, 3),
    "four_ranges": ((140, 130, 2000, 4), 1, 4),
    "five_ranges": ((129, 100, 7576, 5), 1, 5),
    "begin_and_end_within": ((130, 600, 1896, 4), 2, 2),
    "within_one_tile": ((200, 500, 3816, 5), 2, 3),
    "two_ranges_128": ((100, 230, 1608, 2), 1, 2),
    "begin_and_end_within_128": ((128, 600, 1896, 4), 2, 2),
    "tiles_of_tokens": ((600, 300, 752, 4), 2, 2),
    "whole_tiles_between": ((130, 1540, 640, 3), 3, 2),
    "all_of_one": ((600, 300, 392, 1), 6, 1),
    "rounds_of_whole_tiles": ((300, 520, 264, 3), 2, 1),
}


@pytest.mark.parametrize("name", CUTS)
def test_every_cut(emulator: Any, generator: torch.Generator, name: str) -> None:
    product, segments, shared = CUTS[name]
    dtype = torch.float16 if product[2] % 128 == 0 else torch.bfloat16
    shape = check_cut(
        emulator,
        generator,
        product,
        segments,
        shared,
        blocks=PAIR,
        group_size=64,
        dtype=dtype,
        rounded=True,
    )
    assert (shape.rows, shape.tokens) == (256, 128 if product[0] <= 128 else TILE)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_kind_in_ranges(emulator: Any, generator: torch.Generator, kind: Kind) -> None:
    """Scales and codes of segments that begin within groups and tiles."""
    shape = (402, 1544, 160)
    ranges = ranges_of(emulator, 260, shape[0], shape[1], 3)
    assert any(first for segments in ranges for _, first, _ in segments)
    w = make(generator, shape, kind)
    x = torch.randn(260, shape[1], generator=generator).bfloat16()
    w.check(linear(emulator, x, w, multiprocessors=PAIR * 3), x, rounded=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_passes_through_partial_sums(
    emulator: Any, generator: torch.Generator, bad: float
) -> None:
    def product(x: Tensor, w: Any) -> Tensor:
        return linear(emulator, x, w, multiprocessors=PAIR * 5)

    check_bad_passes_through_partial_sums(product, 150, bad, generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 256, 0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_combination(
    emulator: Any, generator: torch.Generator, kind: Kind, group_size: int, dtype: torch.dtype
) -> None:
    cases = (((140, 1000), PAIR, 129), ((270, 1608), CLUSTERS, 257))
    for ((rows, columns), multiprocessors, tokens), scale_dtype in zip(
        cases, (torch.float16, torch.bfloat16), strict=True
    ):
        w = make(generator, (rows, columns, group_size), kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator)
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias, rounded=True)
