"""The CUDA kernel for one token in integers (linear_digits_kernel.h), run on the CPU, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_activations_of_size
from torch import Tensor

# Groups of whole steps of 128 columns, K that ends within a step, a block or a unit, few and many steps, odd numbers of tiles.
SHAPES: tuple[Shape, ...] = (
    (1, 8, 0),
    (17, 136, 128),
    (40, 512, 128),
    (33, 200, 0),
    (49, 1096, 256),
    (48, 2056, 128),
    (16, 4128, 384),
    (95, 2048, 0),
)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("extra", [None, "zeros"])
def test_products(
    emulator: Any, generator: torch.Generator, shape: Shape, extra: str | None
) -> None:
    for dtype, scale_dtype, multiprocessors in itertools.product(HALVES, FLOATS, (1, 1 << 20)):
        w = make(generator, shape, (4, extra), scale_dtype=scale_dtype)
        x = torch.randn(1, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator)
        w.check(emulator.linear(x, w.operands, bias, w.sizes, multiprocessors), x, bias)


@pytest.mark.parametrize("extra", [None, "zeros"])
@pytest.mark.parametrize("power", [-100, -30, -14, 0, 15, 100])
def test_activations_of_any_size(
    emulator: Any, generator: torch.Generator, extra: str | None, power: int
) -> None:
    w = make(generator, (40, 520, 128), (4, extra), scale_dtype=torch.float32)

    def product(x: Tensor) -> Tensor:
        y: Tensor = emulator.linear(x, w.operands, None, w.sizes)
        return y

    check_activations_of_size(product, w, power, generator)


def test_a_large_activation_leaves_the_others_of_its_columns_exact(
    emulator: Any, generator: torch.Generator
) -> None:
    """A thousand times the others, where it meets a weight of nothing: what is left is as exact as the output."""
    w = make(generator, (32, 256, 128), (4, None))
    for dtype in HALVES:
        x = torch.randn(1, 256, generator=generator).to(dtype)
        x[0, 5] = 3000.0
        exact = w.values * w.scales
        rows = exact[:, 5] == 0
        assert rows.any(), "no row has a weight of nothing there: take another seed"
        expected = x.double() @ exact.T
        y = emulator.linear(x, w.operands, None, w.sizes)
        w.check(y, x)
        worst = (y.double() - expected)[:, rows].abs().max()
        assert worst < 2.0**-7 * expected[:, rows].abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_what_is_not_finite_gives_nan_everywhere(
    emulator: Any, generator: torch.Generator, shape: Shape, bad: float
) -> None:
    """Which only this kernel does: other ones leave an infinity what it is. So all these shapes are its own."""
    for dtype, extra in itertools.product(HALVES, (None, "zeros")):
        w = make(generator, shape, (4, extra))
        for column in (0, shape[1] // 2, shape[1] - 1):
            x = torch.randn(1, shape[1], generator=generator).to(dtype)
            x[0, column] = bad
            assert emulator.linear(x, w.operands, None, w.sizes).isnan().all()


def test_groups_of_other_sizes_and_other_bits_are_not_taken(
    emulator: Any, generator: torch.Generator
) -> None:
    for shape, bits in (((20, 512, 64), 4), ((20, 576, 192), 4), ((20, 512, 128), 8)):
        w = make(generator, shape, (bits, None))
        x = torch.randn(1, shape[1], generator=generator).bfloat16()
        x[0, 7] = torch.inf
        y = emulator.linear(x, w.operands, None, w.sizes)
        assert y.isinf().any(), "the kernel for one token in digits gave NaN"


def test_a_scale_that_is_nan_gives_nan_in_its_row(
    emulator: Any, generator: torch.Generator
) -> None:
    w = make(generator, (40, 520, 128), (4, None))
    x = torch.randn(1, 520, generator=generator).bfloat16()
    y = emulator.linear(x, w.with_bad_scale(19, 2).operands, None, w.sizes)
    assert y[0, 19].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize("shared_bytes", [163 << 10, 99 << 10, 40 << 10])
def test_as_many_warps_as_shared_memory_has_room_for(
    emulator: Any, generator: torch.Generator, shared_bytes: int
) -> None:
    w = make(generator, (40, 4096, 128), (4, "zeros"), scale_dtype=torch.float32)
    x = torch.randn(1, 4096, generator=generator).bfloat16()
    w.check(emulator.linear(x, w.operands, None, w.sizes, shared_bytes=shared_bytes), x)
