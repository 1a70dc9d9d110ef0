"""Up to 64 tokens at a time, whose activations two thread blocks share (wgmma_shared.h), run on the CPU, against a float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, Kind, name_of
from fragments_weights import random_weight as make
from product_checks import (
    check_bad_passes_through_partial_sums,
    check_only_bad,
    check_tokens_are_apart,
)
from wgmma_products import check_cut, linear

# (N, K, group_size): rows of one block, which leave the other without any, and of three; columns that end in a chunk, in a unit, and that turn the
# ring of stages around.
SHAPES = ((70, 264, 64), (272, 1328, 128), (33, 200, 0))


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "shared")
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(
    emulator: Any, generator: torch.Generator, shape: tuple[int, int, int], kind: Kind
) -> None:
    for dtype, tokens, scale_dtype in zip(HALVES, (64, 37), FLOATS[:2], strict=True):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype)
        w.check(linear(emulator, x, w, bias), x, bias)


@pytest.mark.parametrize("tokens", [33, 40, 47, 56, 63])
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    w = make(generator, (76, 648, 128), (4, "zeros"))
    x = torch.randn(tokens, 648, generator=generator).bfloat16()
    check_tokens_are_apart(lambda x: linear(emulator, x, w), w, x, generator)


@pytest.mark.parametrize("tokens", [65, 150])
def test_tiles_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """More than 64 float16 tokens with a number of columns that wgmma_pair.h does not take."""
    w = make(generator, (140, 520, 64), (4, None))
    x = torch.randn(tokens, 520, generator=generator).half()
    w.check(linear(emulator, x, w, multiprocessors=6), x)


@pytest.mark.parametrize("tokens", [9, 32])
def test_fewer_tokens_are_not_shared(
    emulator: Any, generator: torch.Generator, tokens: int
) -> None:
    assert emulator.range_plan(tokens, (4, 0, 264, 70), 4)[0].blocks == 1
    w = make(generator, (70, 264, 64), (4, None))
    x = torch.randn(tokens, 264, generator=generator).half()
    w.check(linear(emulator, x, w), x)


# (tokens, N, K, clusters), and what is new: rows of a cluster; segments of a range, ranges of a tile, at most.
CUTS = {
    "four_ranges": ((60, 100, 3848, 5), 256, 1, 4),
    "begin_and_end_within": ((64, 1100, 1896, 3), 256, 3, 2),
    "within_one_tile": ((33, 700, 3816, 5), 256, 2, 3),
    "whole_tiles_between": ((64, 2600, 640, 3), 512, 2, 1),
    "whole_tiles": ((40, 1500, 2600, 3), 512, 1, 1),
}


@pytest.mark.parametrize("name", CUTS)
def test_every_cut(emulator: Any, generator: torch.Generator, name: str) -> None:
    product, of_cluster, segments, shared = CUTS[name]
    shape = check_cut(
        emulator, generator, product, segments, shared, blocks=2, group_size=128, dtype=torch.half
    )
    assert shape.rows == of_cluster


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, bad: float
) -> None:
    check_bad_passes_through_partial_sums(
        lambda x, w: linear(emulator, x, w, multiprocessors=8), 40, bad, generator
    )
    w = make(generator, (20, 136, 128), (4, "nf4"))
    x = torch.randn(39, 136, generator=generator).bfloat16()
    check_only_bad(linear(emulator, x, w.with_bad_scale(13, 1)).T, 13)
