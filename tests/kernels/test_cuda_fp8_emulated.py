"""The CUDA kernels of format fp8 with E4M3 activations, run on the CPU. See cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3
from hfq.kernels import fp8

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
# (N, K): tiles and rounds of all warps that are not full, one piece of 16 columns, several rounds.
SHAPES = ((1, 16), (16, 64), (17, 48), (33, 144), (40, 1024), (5, 2000), (50, 4112))
STATIC = (None, torch.tensor([0.004]))


def equal(found: Tensor, expected: Tensor) -> bool:
    """The same bits; any NaN is NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool(same.all())


def weight(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes uint8 `[N, K]` without NaN, and scales float32 `[N, 1]`."""
    codes = torch.randint(0, 127, (rows, columns), generator=generator)
    codes[0, 0], codes[-1, -1] = 0, 126
    signs = torch.randint(0, 2, codes.shape, generator=generator) * 128
    return (codes + signs).to(torch.uint8), torch.rand(rows, 1, generator=generator) * 0.01


def activations(
    tokens: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    x = torch.randn(tokens, columns, generator=generator) * 3
    x[1:2] = 0
    x[2:3, ::5] *= 100
    return x.to(dtype)


def linear(
    emulator: Any,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    static: Tensor | None,
    bias: Tensor | None = None,
    multiprocessors: int = 1 << 20,
) -> Tensor:
    y: Tensor = emulator.linear_w8a8(x, codes, scales, static, bias, multiprocessors, E4M3)
    return y


def check(
    emulator: Any,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    static: Tensor | None,
    bias: Tensor | None = None,
    multiprocessors: int = 1 << 20,
) -> Tensor:
    """The product, each of whose numbers has to be right up to roundings of float32 sums and of the result."""
    y = linear(emulator, x, codes, scales, static, bias, multiprocessors)
    rounded, token_scales = quantize_tokens(x, static, E4M3)
    factors = token_scales.double() * scales.double().T
    left, right = rounded.double(), codes.view(E4M3).double()
    expected = left @ right.T * factors
    size = left.abs() @ right.abs().T * factors.abs()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    # Sums of 16 products are exact in the emulator and then rounded: K / 16 roundings at most, and 3 of what follows.
    allowed = size * (x.shape[1] / 16 + 3) * 2**-24
    allowed += torch.finfo(x.dtype).eps * expected.abs() + torch.finfo(x.dtype).tiny
    found = y.double()
    overflowed = expected.abs() > torch.finfo(x.dtype).max
    wrong = ((found - expected).abs() > allowed) & ~(overflowed & found.isinf())
    assert not (wrong | found.isnan()).any()
    return y


# ---- the emulator itself, and what stands for an instruction of newer GPUs


def test_e4m3_as_float16(emulator: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    x = torch.cat([codes.view(torch.int32), torch.zeros(64, dtype=torch.int32)])
    halves = emulator.self_check("e4m3_as_halves", x).view(torch.float16)
    assert equal(halves, codes.view(E4M3).to(torch.float16))
    shifted = emulator.self_check("e4m3_as_halves_by_shifts", x).view(torch.float16)
    # Codes 0 and 2 of a word share a register.
    shifted = shifted.view(64, 2, 2).transpose(1, 2).flatten()
    numbers = ~halves.isnan()
    assert torch.equal(shifted[numbers].view(torch.int16), halves[numbers].view(torch.int16))


# ---- tokens


def check_tokens(emulator: Any, x: Tensor, static: Tensor | None) -> Tensor:
    codes, scales = emulator.quantize_tokens(x, static, E4M3)
    expected_codes, expected_scales = quantize_tokens(x, static, E4M3)
    codes = codes.view(torch.uint8)
    assert torch.equal(codes, expected_codes.view(torch.uint8))
    assert equal(scales, expected_scales.contiguous())
    return codes


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
        check_tokens(emulator, x, static)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-9])
def test_every_number_of_16_bits(emulator: Any, dtype: torch.dtype, scale: float) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(16, 4096)
    codes = check_tokens(emulator, x, torch.tensor([scale]))
    assert set(codes.unique().tolist()) == set(range(256)) - {127, 255}


def test_ties_subnormals_and_ends_of_the_range(emulator: Any) -> None:
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([448.0, 464.0, 480.0, 1e30])])
    near = [ties, *(torch.nextafter(ties, torch.tensor(end)) for end in (-INF, INF))]
    x = torch.cat([values, *near, torch.tensor([0.0, 1e-45, 2.0**-126, 2.0**-10])])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))[None].repeat(2, 1)
    x[1, 5] = 448.0
    for static in (None, torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0**-10])):
        codes = check_tokens(emulator, x.clamp(-448, 448) if static is None else x, static)
    codes = check_tokens(emulator, x, torch.tensor([1.0]))
    assert torch.equal(codes[0, :127], torch.arange(127, dtype=torch.uint8))


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
    x[9, 7] = -NAN
    x = x.to(dtype)
    for scale in (None, 0.02, 1e-35, 1.1e-35, 3e38, 0.0, -1.0, NAN, INF):
        check_tokens(emulator, x, None if scale is None else torch.tensor([scale]))


# ---- products


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(
    emulator: Any, generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """1 token, and 3 of short rows, are quantized in the kernel, the others in one of their own."""
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
        alone = linear(emulator, x[-1:].clone(), codes, scales, None, bias)
        assert torch.equal(y[-1:], alone), "a token's outputs do not depend on the others"


@pytest.mark.parametrize("tokens", [1, 3, 8, 20])
def test_where_sums_are_exact_products_are_the_reference_to_the_bit(
    emulator: Any, generator: torch.Generator, tokens: int
) -> None:
    """Codes of whole numbers up to 8: no order of sums rounds."""
    whole = torch.randint(-8, 9, (37, 1104), generator=generator).float()
    scales = torch.rand(37, 1, generator=generator)
    codes = whole.to(E4M3).view(torch.uint8)
    bias = torch.randn(37, generator=generator)
    for dtype in FLOATS:
        x = torch.randint(-8, 9, (tokens, 1104), generator=generator).to(dtype)
        x[:, 3] = 448
        for static in (None, torch.ones(1)):
            y = linear(emulator, x, codes, scales, static, bias)
            assert torch.equal(y, fp8.linear(x, codes[..., None], scales, static, bias))


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
def test_the_largest_sums(emulator: Any, tokens: int) -> None:
    columns = 1 << 17
    codes, scales = torch.full((2, columns), 126, dtype=torch.uint8), torch.ones(2, 1)
    codes[1] = 254
    y = linear(emulator, torch.full((tokens, columns), 448.0), codes, scales, torch.ones(1))
    assert y.tolist() == [[448.0 * 448 * columns, -448.0 * 448 * columns]] * tokens


@pytest.mark.parametrize("static", STATIC, ids=["dynamic", "static"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_number_stays_none(
    emulator: Any, generator: torch.Generator, value: float, static: Tensor | None
) -> None:
    codes, scales = weight(20, 144, generator)
    for tokens, column in itertools.product((4, 11), (0, 77, 143)):
        for dtype in FLOATS:
            x = activations(tokens, 144, dtype, generator)
            clean = linear(emulator, x, codes, scales, static)
            x[tokens - 1, column] = value
            y = linear(emulator, x, codes, scales, static)
            assert y[-1].isnan().all() and torch.equal(y[:-1], clean[:-1])


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF])
def test_an_unusable_static_scale_gives_no_numbers(
    emulator: Any, generator: torch.Generator, scale: float
) -> None:
    codes, scales = weight(20, 144, generator)
    for tokens in (2, 7):
        x = activations(tokens, 144, torch.bfloat16, generator)
        assert linear(emulator, x, codes, scales, torch.tensor([scale])).isnan().all()


@pytest.mark.parametrize("bad", ["scale", "code"])
def test_what_is_no_number_in_a_row_reaches_its_outputs(
    emulator: Any, generator: torch.Generator, bad: str
) -> None:
    codes, scales = weight(20, 144, generator)
    if bad == "scale":
        scales[13] = NAN
    else:
        codes[13, 100] = 255
    for tokens in (2, 7, 20):
        x = activations(tokens, 144, torch.float32, generator)
        finite = linear(emulator, x, codes, scales, None).isfinite()
        assert not finite[:, 13].any() and finite[:, torch.arange(20) != 13].all()


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
