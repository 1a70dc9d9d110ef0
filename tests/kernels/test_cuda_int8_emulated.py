"""The CUDA kernels of W8A8, run on the CPU: equal to the PyTorch reference to the bit. See cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.core.activations import quantize_tokens
from hfq.kernels.int8 import MAX_COLUMNS, int8_linear, scaled_sums

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
# (N, K): tiles and rounds of all warps that are not full, one piece of 16 columns, several rounds.
SHAPES = ((1, 16), (16, 64), (17, 48), (33, 144), (40, 1024), (5, 2000), (50, 4112))
STATIC = (None, torch.tensor([0.02]))


def equal(found: Tensor, expected: Tensor) -> bool:
    """The same bits; any NaN is NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool(same.all())


def weight(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes as stored, uint8 `[N, K]`, and scales float32 `[N, 1]`, of either sign."""
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[0, 0], codes[-1, -1] = 0, 255
    return codes, torch.randn(rows, 1, generator=generator) * 0.01


def activations(
    tokens: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    x = torch.randn(tokens, columns, generator=generator) * 3
    x[1:2] = 0
    x[2:3, ::5] *= 100
    return x.to(dtype)


def check(
    emulator: Any,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    static: Tensor | None,
    bias: Tensor | None = None,
    multiprocessors: int = 1 << 20,
) -> Tensor:
    """The product, which has to be the reference's."""
    y: Tensor = emulator.linear_w8a8(x, codes ^ 128, scales, static, bias, multiprocessors)
    expected = int8_linear(x, codes.unsqueeze(-1), scales, static, bias, x.shape[1])
    assert equal(y, expected)
    return y


# ---- tokens


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [16, 48, 2048, 2064, 8208, 16384, 20016])
def test_tokens(
    emulator: Any, generator: torch.Generator, columns: int, dtype: torch.dtype
) -> None:
    """Up to 16384 (float32: 8192) numbers are kept between two looks at a token, what is behind is read again."""
    kept = 8192 if dtype == torch.float32 else 16384
    largest = [at for at in (0, columns // 2, columns - 1, kept - 1, kept) if at < columns]
    for static in STATIC:
        x = activations(len(largest), columns, dtype, generator)
        x[range(len(largest)), largest] = -1000.0
        codes, scales = emulator.quantize_tokens(x, static)
        expected_codes, expected_scales = quantize_tokens(x, static)
        assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ties_and_ends_of_the_range(emulator: Any, dtype: torch.dtype) -> None:
    steps = torch.arange(-260, 260).repeat(2)[:1024] / 2
    x = torch.stack([steps, steps.clamp(-127, 127), steps * 2.0**-10, steps.roll(7)]).to(dtype)
    x = x[:, :1024].contiguous()
    for static in (None, torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0**-10])):
        codes, scales = emulator.quantize_tokens(x, static)
        expected_codes, expected_scales = quantize_tokens(x, static)
        assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)
    assert codes.min() == -127 and codes.max() == 127


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_tiny_huge_or_no_number(
    emulator: Any, generator: torch.Generator, dtype: torch.dtype
) -> None:
    x = torch.randn(12, 2064, generator=generator)
    for token, value in enumerate(
        (1e-45, 1e-38, 9.99e-36, 1e-35, 1.1e-35, 1e-30, 3e38, 3e38, 0.0, NAN, INF, -INF)
    ):
        if token < 9:
            x[token] *= value / x[token].abs().max()
        else:
            x[token, (5, 2063, 1030)[token % 3]] = value
    x = x.to(dtype)
    for scale in (None, 0.02, 1e-35, 1.1e-35, 3e38, 0.0, -1.0, NAN, INF):
        static = None if scale is None else torch.tensor([scale])
        codes, scales = emulator.quantize_tokens(x, static)
        expected_codes, expected_scales = quantize_tokens(x, static)
        assert torch.equal(codes, expected_codes) and equal(scales, expected_scales)


# ---- products


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(
    emulator: Any, generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """1 and 3 tokens are quantized in the kernel, the others in one of their own."""
    codes, scales = weight(*shape, generator)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    for tokens, static in zip((1, 3, 6, 11, 20), (*STATIC, *STATIC, None), strict=True):
        x = activations(tokens, shape[1], dtype, generator)
        check(emulator, x, codes, scales, static, bias if tokens % 2 else None)


@pytest.mark.parametrize("multiprocessors", [1 << 20, 0], ids=["one tile", "two tiles"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 70])
def test_every_number_of_tokens(
    emulator: Any, generator: torch.Generator, tokens: int, multiprocessors: int
) -> None:
    for rows, columns in ((37, 336), (64, 1600)):
        codes, scales = weight(rows, columns, generator)
        x = activations(tokens, columns, torch.bfloat16, generator)
        bias = torch.randn(rows, generator=generator)
        y = check(emulator, x, codes, scales, None, bias, multiprocessors)
        assert torch.equal(y[-1:], check(emulator, x[-1:].clone(), codes, scales, None, bias))


@pytest.mark.parametrize("columns", [8192, 16384, 16400])
def test_long_rows_quantized_on_either_side(
    emulator: Any, generator: torch.Generator, columns: int
) -> None:
    """2^14 numbers of all tokens are the most that a thread block rounds for itself."""
    codes, scales = weight(18, columns, generator)
    for dtype, tokens in itertools.product(FLOATS, (1, 2)):
        check(emulator, activations(tokens, columns, dtype, generator), codes, scales, None)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    generator: torch.Generator,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    codes, scales = weight(20, 208, generator)
    scales = scales.to(scale_dtype)
    bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
    for dtype, tokens in itertools.product(FLOATS, (2, 9)):
        check(emulator, activations(tokens, 208, dtype, generator), codes, scales, None, bias)


@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(emulator: Any, sign: int, tokens: int) -> None:
    """Code 0 is -128, the largest magnitude; all activations at the end of their range."""
    columns = MAX_COLUMNS
    codes, scales = torch.zeros(2, columns, dtype=torch.uint8), torch.ones(2, 1)
    codes[1] = 255
    x = torch.full((tokens, columns), 127.0 * sign)
    y = check(emulator, x, codes, scales, torch.ones(1))
    assert y[0].tolist() == [-128.0 * 127 * columns * sign, 127.0 * 127 * columns * sign]


@pytest.mark.parametrize("static", STATIC, ids=["dynamic", "static"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_number_stays_none(
    emulator: Any, generator: torch.Generator, value: float, static: Tensor | None
) -> None:
    codes, scales = weight(20, 144, generator)
    for tokens, column in itertools.product((4, 11), (0, 77, 143)):
        for dtype in FLOATS:
            x = activations(tokens, 144, dtype, generator)
            x[tokens - 1, column] = value
            y = check(emulator, x, codes, scales, static)
            assert y[-1].isnan().all() and y[:-1].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF])
def test_an_unusable_static_scale_gives_no_numbers(
    emulator: Any, generator: torch.Generator, scale: float
) -> None:
    codes, scales = weight(20, 144, generator)
    for tokens in (2, 7):
        x = activations(tokens, 144, torch.bfloat16, generator)
        assert check(emulator, x, codes, scales, torch.tensor([scale])).isnan().all()


def test_a_scale_that_is_no_number_reaches_the_outputs_of_its_row(
    emulator: Any, generator: torch.Generator
) -> None:
    codes, scales = weight(20, 144, generator)
    scales[13] = NAN
    for tokens in (2, 7):
        y = check(emulator, activations(tokens, 144, torch.float32, generator), codes, scales, None)
        finite = y.isfinite()
        assert not finite[:, 13].any() and finite[:, torch.arange(20) != 13].all()


# ---- sums of the matrix library


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 4, 7, 1000, 1024, 1025, 2056])
def test_scale_sums(
    emulator: Any, generator: torch.Generator, columns: int, dtype: torch.dtype
) -> None:
    for tokens, bias_dtype, scale_dtype in ((1, None, torch.float32), (9, dtype, torch.float16)):
        sums = torch.randint(
            -(1 << 31), (1 << 31) - 1, (tokens, columns), generator=generator, dtype=torch.int32
        )
        token_scales = torch.rand(tokens, 1, generator=generator)
        token_scales[-1:] = NAN if tokens > 1 else 1e-9
        scales = (torch.randn(columns, 1, generator=generator) * 1e-3).to(scale_dtype)
        bias = None
        if bias_dtype is not None:
            bias = torch.randn(columns, generator=generator).to(bias_dtype)
        expected = scaled_sums(sums, token_scales, scales, bias).to(dtype)
        # At the beginning of memory, and at addresses of single numbers.
        storage = torch.full((tokens * columns + 1,), 12345.0, dtype=dtype)
        for first in (0, 1):
            out = storage[first : first + tokens * columns].view(tokens, columns)
            emulator.scale_sums(out, sums, token_scales, scales, bias)
            assert equal(out, expected)


# ---- all of them


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 32), (16, 512), (31, 1040), (65, 3216), (130, 4096)], ids=str
)
def test_every_combination(
    emulator: Any, generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for tokens, static, multiprocessors in itertools.product(
        (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 40), STATIC, (0, 1 << 20)
    ):
        codes, scales = weight(*shape, generator)
        bias = torch.randn(shape[0], generator=generator) if tokens % 2 else None
        x = activations(tokens, shape[1], dtype, generator)
        check(emulator, x, codes, scales, static, bias, multiprocessors)
