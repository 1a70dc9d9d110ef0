"""The CUDA kernel for one token and a codebook in integers (wide_digits.h), run on the CPU, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_activations_of_size
from wgmma_products import ALONE, CLUSTERS, linear

# Groups of half and of whole steps, K that ends within a step, a block or a unit, odd and even numbers of tiles, one and several thread blocks.
SHAPES: tuple[Shape, ...] = (
    (1, 8, 0),
    (17, 136, 64),
    (70, 264, 128),
    (130, 520, 192),
    (33, 200, 0),
    (48, 2056, 64),
    (272, 1096, 0),
    (95, 2048, 256),
)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WIDE", "1")
    monkeypatch.setenv("HFQ_CUDA_DIGITS", "1")


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, codebook: str) -> None:
    for dtype, scale_dtype, multiprocessors in zip(
        3 * HALVES, 2 * FLOATS, (ALONE, 4, CLUSTERS, ALONE, 4, CLUSTERS), strict=True
    ):
        w = make(generator, shape, (4, codebook), scale_dtype=scale_dtype)
        x = torch.randn(1, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator)
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias, digits=True)


@pytest.mark.parametrize("splits", range(1, 9))
def test_every_cluster(emulator: Any, generator: torch.Generator, splits: int) -> None:
    """One block of a cluster has the token, and all others push their sums to it."""
    w = make(generator, (40, 128 * 66 - 56, 64), (4, "nf4"))
    x = torch.randn(1, w.sizes[2], generator=generator).half()
    bias = torch.randn(40, generator=generator)
    w.check(linear(emulator, x, w, bias, splits), x, bias, digits=True)


@pytest.mark.parametrize("numbers", ["random", "small and large", "zeros", "one sign"])
def test_any_codebook(emulator: Any, generator: torch.Generator, numbers: str) -> None:
    """Numbers in any order and of any size; those far below the largest one become multiples of 1/8191 of it."""
    w = make(generator, (70, 520, 64), (4, "nf4"))
    values = torch.randn(16, generator=generator)
    if numbers == "small and large":
        values *= 2.0 ** torch.randint(-40, 40, (16,), generator=generator)
    elif numbers == "zeros":
        values = torch.zeros(16)
    elif numbers == "one sign":
        values = values.abs()
    w = w.with_codebook(values)
    x = torch.randn(1, 520, generator=generator).bfloat16()
    y = linear(emulator, x, w)
    if numbers == "zeros":
        assert (y == 0).all()
    else:
        w.check(y, x, digits=True)


def test_small_codebook(emulator: Any, generator: torch.Generator) -> None:
    """A number that 1/8191 of is no normal number."""
    w = make(generator, (70, 520, 64), (4, "nf4"))
    w = w.with_codebook(torch.randn(16, generator=generator) * 1e-36)
    x = (torch.randn(1, 520, generator=generator) * 1e36).bfloat16()
    w.check(linear(emulator, x, w), x, digits=True)


@pytest.mark.parametrize("power", [-100, -30, -14, 15, 100])
def test_activations_of_any_size(emulator: Any, generator: torch.Generator, power: int) -> None:
    w = make(generator, (40, 520, 64), (4, "nf4"), scale_dtype=torch.float32)
    check_activations_of_size(lambda x: linear(emulator, x, w), w, power, generator, digits=True)


def test_finer_than_bfloat16(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the kernel that looks numbers up as they are in the dtype of x."""
    w = make(generator, (64, 4096, 64), (4, "nf4"), scale_dtype=torch.float32)
    x = torch.randn(1, 4096, generator=generator).bfloat16()
    exact = x.double() @ (w.values * w.scales).T
    errors = []
    for digits in ("1", "0"):
        monkeypatch.setenv("HFQ_CUDA_DIGITS", digits)
        y = linear(emulator, x, w, -exact[0].float())
        errors.append(y.double().square().mean().sqrt())
    assert errors[0] < errors[1] / 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gives_nan(
    emulator: Any, generator: torch.Generator, bad: float
) -> None:
    """In all outputs of an activation, in its row of a scale."""
    for shape, dtype in itertools.product(SHAPES[:4], HALVES):
        w = make(generator, shape, (4, "nf4"))
        for column in (0, shape[1] // 2, shape[1] - 1):
            x = torch.randn(1, shape[1], generator=generator).to(dtype)
            x[0, column] = bad
            assert linear(emulator, x, w).isnan().all()
    y = linear(emulator, x.zero_(), w.with_bad_scale(19, 2))
    assert y[0, 19].isnan() and y.isnan().sum() == 1


def test_only_one_token_and_only_where_it_is_wanted(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = make(generator, (20, 512, 64), (4, "nf4"))
    two = torch.randn(2, 512, generator=generator).bfloat16()
    w.check(linear(emulator, two, w), two)
    monkeypatch.delenv("HFQ_CUDA_DIGITS")
    w.check(linear(emulator, two[:1], w), two[:1])
