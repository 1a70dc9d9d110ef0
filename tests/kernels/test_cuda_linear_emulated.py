"""The CUDA kernels for few tokens and for rows of layout fragments, run on the CPU, against float64. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_emulator import check_operators
from fragments_weights import FEW_TOKENS, FLOATS, HALVES, KINDS, SHAPES, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_dtypes, check_only_bad
from torch import Tensor

# ---- products


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype in zip(
        HALVES, (1, 5), (torch.float16, torch.float32), strict=True
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        w.check(emulator.linear(x, w.operands, None, w.sizes), x)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19])
@pytest.mark.parametrize("multiprocessors", [1 << 20, 0], ids=["one tile", "two tiles"])
def test_every_number_of_tokens(
    emulator: Any, generator: torch.Generator, tokens: int, multiprocessors: int
) -> None:
    w = make(generator, (37, 328, 64), (4, "zeros"))
    x = torch.randn(tokens, 328, generator=generator).bfloat16()
    bias = torch.randn(37, generator=generator)
    y = emulator.linear(x, w.operands, bias, w.sizes, multiprocessors)
    w.check(y, x, bias)
    alone = torch.cat([emulator.linear(one, w.operands, bias, w.sizes) for one in x.split(1)])
    if tokens <= FEW_TOKENS:
        assert torch.equal(y, alone), "a token's result depends on its neighbours"
    else:
        w.check(alone, x, bias)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_two_tiles_of_rows_give_what_one_gives(
    emulator: Any, generator: torch.Generator, kind: Kind
) -> None:
    for rows, dtype in zip((40, 64), HALVES, strict=True):
        w = make(generator, (rows, 456, 96), kind)
        x = torch.randn(4, 456, generator=generator).to(dtype)
        two = emulator.linear(x, w.operands, None, w.sizes, multiprocessors=0)
        w.check(two, x)
        assert torch.equal(two, emulator.linear(x, w.operands, None, w.sizes))


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    generator: torch.Generator,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    def product(x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
        y: Tensor = emulator.linear(x, w.operands, bias, w.sizes)
        return y

    check_dtypes(product, 2, scale_dtype, bias_dtype, generator)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_reaches_the_outputs_of_its_token(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    w = make(generator, (20, 136, 64), kind)
    for dtype, column, multiprocessors in zip(HALVES, (135, 3), (0, 1 << 20), strict=True):
        x = torch.randn(7, 136, generator=generator).to(dtype)
        x[4, column] = bad
        check_only_bad(emulator.linear(x, w.operands, None, w.sizes, multiprocessors), 4)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_scale_that_is_no_number_reaches_the_outputs_of_its_row(
    emulator: Any, generator: torch.Generator, kind: Kind
) -> None:
    w = make(generator, (20, 200, 64), kind).with_bad_scale(13, 3)
    x = torch.randn(3, 200, generator=generator).bfloat16()
    check_only_bad(emulator.linear(x, w.operands, None, w.sizes).T, 13)


def test_large_and_tiny_activations(emulator: Any, generator: torch.Generator) -> None:
    for kind in KINDS:
        w = make(generator, (16, 64, 32), kind)
        zero = torch.zeros(1, 64, dtype=torch.bfloat16)
        assert torch.equal(emulator.linear(zero, w.operands, None, w.sizes), zero[:, :16])
        # E4M3 has larger numbers than all others.
        large = 3e3 if kind[1] == "e4m3" else 1e4
        for dtype, size in ((torch.bfloat16, 1e30), (torch.float16, large), (torch.float16, 6e-8)):
            # One column each, so that no product leaves float16.
            x = torch.zeros(8, 64, dtype=dtype)
            x[torch.arange(8), torch.arange(8) * 8 + 1] = size
            y = emulator.linear(x, w.operands, None, w.sizes)
            assert y.isfinite().all()
            w.check(y, x)


# ---- rows


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_dequantize_is_the_reference(
    emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind
) -> None:
    for scale_dtype, dtype in zip(
        FLOATS, (torch.bfloat16, torch.float16, torch.float32), strict=True
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        dense = emulator.unpack(None, w.operands, w.sizes, dtype)
        assert torch.equal(dense, w.reference(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_lookup_gives_rows_of_the_dequantized_weight(
    emulator: Any, generator: torch.Generator, kind: Kind
) -> None:
    w = make(generator, (45, 264, 32), kind)
    for dtype, count in zip(FLOATS, (1, 16, 33), strict=True):
        index = torch.randint(45, (count,), generator=generator)
        rows = emulator.unpack(index, w.operands, w.sizes, dtype)
        assert torch.equal(rows, w.reference(dtype)[index])
    outside = torch.tensor([3, -1, 45, 44])
    rows = emulator.unpack(outside, w.operands, w.sizes, torch.float32)
    assert rows.isnan().all(1).tolist() == [False, True, True, False]


# ---- operators


def test_operators_and_modules(emulator: Any) -> None:
    """The binding, the row and modules with it: on CPU tensors, in a process whose CPU is the emulated GPU."""
    check_operators(emulator.folder, "check_linear.py")


# ---- all of them


def _every_case() -> Iterator[Any]:
    for kind, group_size, dtype in itertools.product(KINDS, (32, 64, 96, 128, 160, 0), HALVES):
        yield pytest.param(kind, group_size, dtype, id=f"{name_of(kind)}-{group_size}-{dtype}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group_size", "dtype"), list(_every_case()))
def test_every_combination(
    emulator: Any, generator: torch.Generator, kind: Kind, group_size: int, dtype: torch.dtype
) -> None:
    for (rows, columns), tokens, multiprocessors in itertools.product(
        ((1, 40), (17, 1000), (40, 328), (64, 4096)), (1, 2, 8, 11, 33), (0, 1 << 20)
    ):
        w = make(generator, (rows, columns, group_size), kind)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator) if tokens % 2 else None
        w.check(emulator.linear(x, w.operands, bias, w.sizes, multiprocessors), x, bias)
