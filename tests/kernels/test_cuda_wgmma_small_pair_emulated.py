"""17 to 64 tokens in pairs of thread blocks whose warps are two teams (wgmma_small_pair.h), run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_only_bad, check_tokens_are_apart
from wgmma_products import CLUSTERS, arranged_floats, contributors, linear, ranges_of

# Those without zero points and codebook.
TAKEN = tuple(kind for kind in KINDS if kind[1] in (None, "e4m3"))
# (N, K, group_size; 0: one group per row): rows that fill no tile or block, pairs whose second block has some or none; columns that end in a chunk;
# one chunk, which is one team's; groups of whole chunks.
SHAPES = (
    (1, 8, 0),
    (17, 136, 128),
    (128, 264, 128),
    (270, 520, 256),
    (133, 392, 0),
    pytest.param((400, 1160, 384), marks=pytest.mark.slow),
)
TILE = 64  # tokens of a stage
PAIR = 2  # multiprocessors for one pair
RANGE_FLOATS = 4 + 2 * 128 * TILE  # of a range in the workspace: flags, in fours, and partial sums


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "pairs")
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")


# ---- which products


def test_the_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace shows which kernel is taken, where there is as much shared memory as it needs."""
    x = torch.randn(65, 1032, generator=generator).bfloat16()

    def is_pair(tokens: int, kind: Kind = (4, None), group_size: int = 128) -> bool:
        w = make(generator, (40, 1032, group_size), kind)
        stage = {2: 21, 3: 23, 4: 25, 8: 33}[kind[0]] << 10
        room = ((227 - 32 << 10) - 256) // stage * stage + (32 << 10) + 256
        product = x[:tokens], w.operands, w.sizes, 90
        taken = [
            emulator.workspace_of(*product, most, PAIR)
            == arranged_floats(tokens, 1032, TILE) + RANGE_FLOATS
            for most in (room - 1, room)
        ]
        return taken[1] and not taken[0]

    assert not is_pair(16) and is_pair(17) and is_pair(64) and not is_pair(65)
    for kind in TAKEN:
        assert is_pair(40, kind)
    assert is_pair(40, group_size=256) and is_pair(40, group_size=0)
    assert not is_pair(40, group_size=64) and not is_pair(40, group_size=192)
    assert not is_pair(40, (4, "zeros")) and not is_pair(40, (4, "nf4"))
    monkeypatch.delenv("HFQ_CUDA_WGMMA")
    assert not is_pair(40)


# ---- products


@pytest.mark.parametrize("kind", TAKEN, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype, multiprocessors in zip(
        HALVES, (17, 64), (torch.float16, torch.float32), (CLUSTERS, PAIR), strict=True
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens == 17 else None
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dtypes(
    emulator: Any, generator: torch.Generator, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    for kind, bias_dtype in (((4, None), torch.float32), ((3, None), torch.bfloat16)):
        w = make(generator, (276, 648, 128), kind, scale_dtype=scale_dtype)
        x = torch.randn(50, 648, generator=generator).to(dtype)
        bias = torch.randn(276, generator=generator).to(bias_dtype)
        w.check(linear(emulator, x, w, bias, CLUSTERS), x, bias)


@pytest.mark.parametrize("tokens", [17, 18, 24, 31, 32, 33, 40, 47, 57, 63, 64])
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's."""
    w = make(generator, (140, 648, 128), (4, None))
    x = torch.randn(tokens, 648, generator=generator).bfloat16()
    check_tokens_are_apart(lambda x: linear(emulator, x, w, multiprocessors=PAIR), w, x, generator)


def test_each_stage_is_used_many_times(emulator: Any, generator: torch.Generator) -> None:
    for kind in TAKEN:
        w = make(generator, (40, 27 * 128 + 72, 128), kind)
        x = torch.randn(40, w.sizes[2], generator=generator).bfloat16()
        w.check(linear(emulator, x, w, multiprocessors=PAIR), x)


@pytest.mark.parametrize("kind", TAKEN, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    for dtype, column in (*((dtype, 135) for dtype in HALVES), (torch.bfloat16, 3)):
        w = make(generator, (140, 264, 128), kind)
        x = torch.randn(50, 264, generator=generator).to(dtype)
        x[41, column] = bad
        check_only_bad(linear(emulator, x, w, multiprocessors=PAIR), 41)
        x[41, column] = 0
        check_only_bad(linear(emulator, x, w.with_bad_scale(133, 1), multiprocessors=PAIR).T, 133)


# ---- ranges of all chunks


@pytest.mark.parametrize(
    ("rows", "columns", "most", "shared"),
    [
        # Shapes of Llama 3 8B and 70B. Chunks of a range at most, and ranges of a tile.
        (14336, 4096, 28, 2),
        (4096, 14336, 29, 4),
        (28672, 8192, 109, 2),
        (4096, 4096, 9, 4),
    ],
)
def test_plans_of_an_h200(emulator: Any, rows: int, columns: int, most: int, shared: int) -> None:
    """66 pairs run at a time."""
    found = ranges_of(emulator, 64, rows, columns, 66)
    assert max(sum(count for _, _, count in segments) for segments in found) == most
    assert max(contributors(found).values()) == shared


# (tokens, N, K, pairs), and what is new: segments of a range, ranges of a tile, at most. Odd and even numbers of chunks: teams change places.
CUTS = {
    "two_ranges": ((50, 230, 5000, 2), 1, 2),
    "three_ranges": ((64, 256, 7168, 3), 1, 3),
    "four_ranges": ((40, 130, 10000, 4), 1, 4),
    "five_ranges": ((29, 100, 20104, 5), 1, 5),
    "begin_and_end_within": ((30, 600, 6400, 4), 2, 2),
    "within_one_tile": ((60, 500, 12776, 5), 2, 3),
    "whole_tiles_between": ((33, 1540, 2176, 3), 3, 2),
    "all_of_one": ((60, 300, 392, 1), 2, 1),
    "rounds_of_whole_tiles": ((30, 1200, 264, 3), 2, 1),
}


@pytest.mark.parametrize("name", CUTS)
def test_every_cut(emulator: Any, generator: torch.Generator, name: str) -> None:
    """Results are right and the same each time, whoever adds them up."""
    (tokens, rows, columns, pairs), segments, shared = CUTS[name]
    ranges = ranges_of(emulator, tokens, rows, columns, pairs)
    assert max(map(len, ranges)) == segments
    assert max(contributors(ranges).values()) == shared
    w = make(generator, (rows, columns, 128), (4, None))
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    bias = torch.randn(rows, generator=generator)
    y = linear(emulator, x, w, bias, PAIR * pairs)
    w.check(y, x, bias)
    assert torch.equal(y, linear(emulator, x, w, bias, PAIR * pairs))


@pytest.mark.parametrize("kind", TAKEN, ids=name_of)
def test_every_kind_in_ranges(emulator: Any, generator: torch.Generator, kind: Kind) -> None:
    shape = (402, 6408, 256)
    ranges = ranges_of(emulator, 60, shape[0], shape[1], 3)
    assert any(first % 2 for segments in ranges for _, first, _ in segments)
    w = make(generator, shape, kind)
    x = torch.randn(60, shape[1], generator=generator).half()
    w.check(linear(emulator, x, w, multiprocessors=PAIR * 3), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_passes_through_partial_sums(
    emulator: Any, generator: torch.Generator, bad: float
) -> None:
    w = make(generator, (130, 5000, 128), (4, None))
    assert contributors(ranges_of(emulator, 50, 130, 5000, 3)) == {0: 3}
    for column in (0, 2500, 4999):  # of the range that adds, and of others
        x = torch.randn(50, 5000, generator=generator).half()
        x[41, column] = bad
        check_only_bad(linear(emulator, x, w, multiprocessors=PAIR * 3), 41)
