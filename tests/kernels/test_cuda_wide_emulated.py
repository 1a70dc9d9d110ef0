"""The CUDA kernels with many rows for each read of x (wide_kernel.h), run on the CPU, against a float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_only_bad, check_tokens_are_apart
from wgmma_products import ALONE, CLUSTERS, linear

# (N, K, group_size; 0: one group per row): rows that fill no tile or thread block, columns that end in a step, groups of half and whole steps.
SHAPES: tuple[Shape, ...] = (
    (1, 8, 0),
    (17, 136, 64),
    (70, 264, 128),
    (130, 520, 192),
    (272, 1096, 0),
    (97, 2056, 256),
)
TOKENS = (1, 2, 7, 8, 9, 16)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_TRY", "wide")
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "0")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    # One thread block for all columns, clusters, and as many as are used at most.
    devices = (ALONE, 4, CLUSTERS)
    for tokens, dtype, scale_dtype, multiprocessors in zip(
        TOKENS, 3 * HALVES, 2 * FLOATS, 2 * devices, strict=True
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias)


@pytest.mark.parametrize("splits", range(1, 9))
@pytest.mark.parametrize("kind", [(4, None), (4, "nf4"), (8, "zeros")], ids=name_of)
def test_every_cluster(emulator: Any, generator: torch.Generator, splits: int, kind: Kind) -> None:
    """Columns shared out among up to eight blocks of four to eight warps, some with a step less than others."""
    w = make(generator, (150, 128 * (8 * splits + 3) + 72, 128), kind)
    x = torch.randn(11, w.sizes[2], generator=generator).half()
    bias = torch.randn(150, generator=generator)
    w.check(linear(emulator, x, w, bias, 2 * splits), x, bias)


@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's: neither on those that exist nor on memory where none is."""
    w = make(generator, (76, 1224, 64), (4, "zeros"))
    x = torch.randn(tokens, 1224, generator=generator).bfloat16()
    check_tokens_are_apart(
        lambda x: linear(emulator, x, w, multiprocessors=CLUSTERS), w, x, generator
    )


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    w = make(generator, (20, 136, 64), kind)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = torch.randn(13, 136, generator=generator).to(dtype)
        x[11, column] = bad
        check_only_bad(linear(emulator, x, w, multiprocessors=CLUSTERS), 11)
    x = torch.randn(9, 136, generator=generator).bfloat16()
    check_only_bad(linear(emulator, x, w.with_bad_scale(13, 1), multiprocessors=CLUSTERS).T, 13)


def test_the_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the memory that the kernel otherwise taken for 9 tokens and more asks for."""

    def is_wide(tokens: int, group_size: int, capability: int = 90) -> bool:
        w = make(generator, (64, 4224, group_size), (4, None))
        x = torch.randn(tokens, 4224, generator=generator).bfloat16()
        return not emulator.gives_gemm_workspace(x, w.operands, w.sizes, capability)

    assert all(is_wide(16, group_size) for group_size in (0, 64, 128, 192, 384))
    assert not is_wide(16, 32) and not is_wide(16, 96)  # scales within 64 columns
    assert not is_wide(17, 128)
    assert not is_wide(16, 128, 80) and not is_wide(16, 128, 100)
    monkeypatch.setenv("HFQ_CUDA_TRY", "narrow,wider")
    assert not is_wide(16, 128)
    monkeypatch.setenv("HFQ_CUDA_TRY", "narrow,wide")
    assert is_wide(16, 128)
    monkeypatch.delenv("HFQ_CUDA_TRY")
    assert not is_wide(16, 128)
