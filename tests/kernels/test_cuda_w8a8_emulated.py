"""The CUDA kernels for activations of 8 bits, int8 and E4M3, run on the CPU. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_emulator import check_operators
from torch import Tensor
from w8a8_weights import FLOATS, FP8, INT8, KINDS, Kind, equal, prepared

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3
from hfq.kernels.int8 import MAX_COLUMNS, scaled_sums

NAN, INF = float("nan"), float("inf")
# (N, K): tiles and rounds of all warps that are not full, one piece of 16 columns, several rounds.
SHAPES = ((1, 16), (16, 64), (17, 48), (33, 144), (40, 1024), (5, 2000), (50, 4112))

Product = Callable[..., Tensor]


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def product(kind: Kind, emulator: Any) -> Product:
    """The kernel's product, each of whose numbers is right."""

    def checked(
        x: Tensor, grid: Any, bias: Tensor | None = None, multiprocessors: int = 1 << 20
    ) -> Tensor:
        ready = prepared(kind, grid)
        operands = (ready.qweight, ready.scales, ready.input_scale, bias)
        y: Tensor = emulator.linear_w8a8(x, *operands, multiprocessors, kind.dtype)
        # Sums of 16 products are exact in the emulator and then rounded: K / 16 roundings at most, and 3 of what follows.
        kind.check(y, x, grid, bias, roundings=x.shape[1] / 16 + 3)
        return y

    return checked


def scales(kind: Kind) -> tuple[Tensor | None, ...]:
    """Of activations: dynamic and static."""
    return None, torch.tensor([kind.static])


def activations(
    tokens: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    x = torch.randn(tokens, columns, generator=generator) * 3
    x[1:2] = 0
    x[2:3, ::5] *= 100
    return x.to(dtype)


# ---- codes


def test_e4m3_as_float16(self_check: Any) -> None:
    """The second way stands for an instruction of newer GPUs."""
    codes = torch.arange(256, dtype=torch.uint8)
    x = torch.cat([codes.view(torch.int32), torch.zeros(64, dtype=torch.int32)])
    halves = self_check.run("e4m3_as_halves", x).view(torch.float16)
    assert equal(halves, codes.view(E4M3).to(torch.float16))
    shifted = self_check.run("e4m3_as_halves_by_shifts", x).view(torch.float16)
    # Codes 0 and 2 of a word share a register.
    shifted = shifted.view(64, 2, 2).transpose(1, 2).flatten()
    numbers = ~halves.isnan()
    assert torch.equal(shifted[numbers].view(torch.int16), halves[numbers].view(torch.int16))


# ---- tokens


def check_tokens(kind: Kind, emulator: Any, x: Tensor, static: Tensor | None) -> Tensor:
    """The codes, which have to be the reference's, like the scales."""
    codes, token_scales = emulator.quantize_tokens(x, static, kind.dtype)
    expected_codes, expected_scales = quantize_tokens(x, static, kind.dtype)
    assert codes.dtype == expected_codes.dtype
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert equal(token_scales, expected_scales)
    return codes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [16, 48, 2048, 2064, 8208, 16384, 20016])
def test_tokens(
    kind: Kind, emulator: Any, generator: torch.Generator, columns: int, dtype: torch.dtype
) -> None:
    """Up to 16384 (float32: 8192) numbers are kept between two looks at a token, what is behind is read again."""
    kept = 8192 if dtype == torch.float32 else 16384
    largest = [at for at in (0, columns // 2, columns - 1, kept - 1, kept) if at < columns]
    for static in scales(kind):
        x = activations(len(largest), columns, dtype, generator)
        x[range(len(largest)), largest] = -1000.0
        check_tokens(kind, emulator, x, static)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_ties_and_ends_of_the_range(emulator: Any, dtype: torch.dtype) -> None:
    steps = torch.arange(-260, 260).repeat(2)[:1024] / 2
    x = torch.stack([steps, steps.clamp(-127, 127), steps * 2.0**-10, steps.roll(7)]).to(dtype)
    x = x[:, :1024].contiguous()
    for static in (None, torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0**-10])):
        codes = check_tokens(INT8, emulator, x, static)
    assert codes.min() == -127 and codes.max() == 127


def test_e4m3_ties_subnormals_and_ends_of_the_range(emulator: Any) -> None:
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([448.0, 464.0, 480.0, 1e30])])
    near = [ties, *(torch.nextafter(ties, torch.tensor(end)) for end in (-INF, INF))]
    x = torch.cat([values, *near, torch.tensor([0.0, 1e-45, 2.0**-126, 2.0**-10])])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))[None].repeat(2, 1)
    x[1, 5] = 448.0
    for static in (None, torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0**-10])):
        check_tokens(FP8, emulator, x.clamp(-448, 448) if static is None else x, static)
    codes = check_tokens(FP8, emulator, x, torch.tensor([1.0])).view(torch.uint8)
    assert torch.equal(codes[0, :127], torch.arange(127, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-9])
def test_e4m3_of_every_number_of_16_bits(emulator: Any, dtype: torch.dtype, scale: float) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(16, 4096)
    codes = check_tokens(FP8, emulator, x, torch.tensor([scale])).view(torch.uint8)
    assert set(codes.unique().tolist()) == set(range(256)) - {127, 255}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_tiny_huge_or_no_number(
    kind: Kind, emulator: Any, generator: torch.Generator, dtype: torch.dtype
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
        check_tokens(kind, emulator, x, None if scale is None else torch.tensor([scale]))


# ---- products


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(
    kind: Kind,
    product: Product,
    generator: torch.Generator,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """1 token, and 3 (E4M3: of short rows), are quantized in the kernel, the others in one of their own."""
    grid = kind.stored(generator, *shape)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    for tokens, static in zip((1, 3, 6, 11, 20), (*scales(kind) * 2, None), strict=True):
        x = activations(tokens, shape[1], dtype, generator)
        product(x, replace(grid, input_scale=static), bias if tokens % 2 else None)


@pytest.mark.parametrize("multiprocessors", [1 << 20, 0], ids=["one tile", "two tiles"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 70])
def test_every_number_of_tokens(
    kind: Kind, product: Product, generator: torch.Generator, tokens: int, multiprocessors: int
) -> None:
    for rows, columns in ((37, 336), (64, 1600)):
        grid = kind.stored(generator, rows, columns)
        x = activations(tokens, columns, torch.bfloat16, generator)
        bias = torch.randn(rows, generator=generator)
        y, alone = product(x, grid, bias, multiprocessors), product(x[-1:].clone(), grid, bias)
        assert torch.equal(y[-1:], alone), "a token's outputs do not depend on the others"


@pytest.mark.parametrize("tokens", [1, 3, 8, 20])
@pytest.mark.parametrize("kind", [FP8], ids=str)
def test_where_sums_are_exact_products_are_the_reference_to_the_bit(
    kind: Kind, product: Product, generator: torch.Generator, tokens: int
) -> None:
    """Codes of whole numbers up to 8: no order of sums rounds."""
    whole = torch.randint(-8, 9, (37, 1104, 1), generator=generator).float()
    grid = replace(
        kind.stored(generator, 37, 1104),
        qweight=whole.to(E4M3).view(torch.uint8),
        scales=torch.rand(37, 1, generator=generator),
    )
    bias = torch.randn(37, generator=generator)
    for dtype in FLOATS:
        x = torch.randint(-8, 9, (tokens, 1104), generator=generator).to(dtype)
        x[:, 3] = 448
        for static in (None, torch.ones(1)):
            own = replace(grid, input_scale=static)
            assert torch.equal(product(x, own, bias), kind.expected(x, own, bias))


@pytest.mark.parametrize("tokens", [1, 3, 7, 12, 33])
def test_gpus_that_do_not_convert_e4m3_compute_the_same(
    emulator: Any, generator: torch.Generator, tokens: int
) -> None:
    """Other codes share a register, the same ones of weights and tokens."""
    for (rows, columns), dtype in itertools.product(SHAPES, FLOATS):
        grid = FP8.stored(generator, rows, columns)
        x = activations(tokens, columns, dtype, generator)
        arguments = (x, grid.qweight, grid.scales, None, None, 1, E4M3)
        converted, shifted = (
            emulator.linear_w8a8(*arguments, capability=capability) for capability in (89, 80)
        )
        FP8.check(shifted, x, grid, None, roundings=columns / 16 + 3)
        assert torch.equal(shifted, converted)


@pytest.mark.parametrize("columns", [8192, 16384, 16400])
def test_long_rows_quantized_on_either_side(
    kind: Kind, product: Product, generator: torch.Generator, columns: int
) -> None:
    """2^14 numbers of all tokens are the most that a thread block rounds for itself."""
    grid = kind.stored(generator, 18, columns)
    for dtype, tokens in itertools.product(FLOATS, (1, 2)):
        product(activations(tokens, columns, dtype, generator), grid)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    kind: Kind,
    product: Product,
    generator: torch.Generator,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    grid = kind.stored(generator, 20, 208)
    grid = replace(grid, scales=grid.scales.to(scale_dtype))
    bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
    for dtype, tokens in itertools.product(FLOATS, (2, 9)):
        product(activations(tokens, 208, dtype, generator), grid, bias)


@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize(
    ("kind", "codes", "values", "largest"),
    [
        (INT8, (0, 255), (-128.0, 127.0), 127.0),
        (INT8, (0, 255), (-128.0, 127.0), -127.0),
        (FP8, (126, 254), (448.0, -448.0), 448.0),
    ],
    ids=["int8", "int8 negative", "fp8"],
)
def test_the_largest_sums_do_not_overflow(
    kind: Kind,
    product: Product,
    generator: torch.Generator,
    codes: tuple[int, int],
    values: tuple[float, float],
    largest: float,
    tokens: int,
) -> None:
    """Of two rows with one code each, and activations at the end of their range."""
    columns = MAX_COLUMNS
    qweight = torch.tensor(codes, dtype=torch.uint8)[:, None, None].repeat(1, columns, 1)
    grid = replace(
        kind.stored(generator, 2, columns),
        qweight=qweight,
        scales=torch.ones(2, 1),
        input_scale=torch.ones(1),
    )
    y = product(torch.full((tokens, columns), largest), grid)
    assert y.tolist() == [[value * largest * columns for value in values]] * tokens


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_number_stays_none(
    kind: Kind, product: Product, generator: torch.Generator, value: float, static: bool
) -> None:
    grid = replace(kind.stored(generator, 20, 144), input_scale=scales(kind)[static])
    for tokens, column in itertools.product((4, 11), (0, 77, 143)):
        for dtype in FLOATS:
            x = activations(tokens, 144, dtype, generator)
            clean = product(x, grid)
            x[tokens - 1, column] = value
            y = product(x, grid)
            assert y[-1].isnan().all() and y[:-1].isfinite().all()
            assert torch.equal(y[:-1], clean[:-1])


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF])
def test_an_unusable_static_scale_gives_no_numbers(
    kind: Kind, product: Product, generator: torch.Generator, scale: float
) -> None:
    grid = kind.stored(generator, 20, 144, static=scale)
    for tokens in (2, 7):
        x = activations(tokens, 144, torch.bfloat16, generator)
        assert product(x, grid).isnan().all()


@pytest.mark.parametrize(("kind", "bad"), [(INT8, "scale"), (FP8, "scale"), (FP8, "code")], ids=str)
def test_what_is_no_number_in_a_row_reaches_its_outputs(
    kind: Kind, product: Product, generator: torch.Generator, bad: str
) -> None:
    grid = kind.stored(generator, 20, 144)
    if bad == "scale":
        grid.scales[13] = NAN
    else:
        grid.qweight[13, 100] = 255
    for tokens in (2, 7, 20):
        x = activations(tokens, 144, torch.float32, generator)
        finite = product(x, grid).isfinite()
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


# ---- operators


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 15), (7, 2048), (4, 2056), (9, 4100)])
def test_dequantize(
    emulator: Any, kind: Kind, generator: torch.Generator, shape: tuple[int, int]
) -> None:
    """All codes but NaN, at any address, to the last bit."""
    codes = torch.randint(0, 256, (shape[0] * shape[1] + 8,), generator=generator)
    if kind is FP8:
        codes[codes % 128 == 127] = 0
    for scale_dtype, dtype in itertools.product(FLOATS, FLOATS):
        first = int(torch.randint(0, 2, (), generator=generator)) * 3
        part = codes.to(torch.uint8)[first:][: shape[0] * shape[1]].view(shape)
        scales = torch.randn(shape[0], 1, generator=generator).to(scale_dtype)
        numbers = part.view(kind.dtype).float() * scales.float()
        y = emulator.unpack_bytes(part, scales, dtype, kind.dtype)
        assert torch.equal(y, numbers.to(dtype))


def test_operators_and_modules(emulator: Any) -> None:
    """The binding, the rows and modules with them: on CPU tensors, in a process whose CPU is the emulated GPU."""
    check_operators(emulator.folder, "check_w8a8.py")


# ---- all of them


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 32), (16, 512), (31, 1040), (65, 3216), (130, 4096)], ids=str
)
def test_every_combination(
    kind: Kind,
    product: Product,
    generator: torch.Generator,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    for tokens, static, multiprocessors in itertools.product(
        (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 40), scales(kind), (0, 1 << 20)
    ):
        grid = replace(kind.stored(generator, *shape), input_scale=static)
        bias = torch.randn(shape[0], generator=generator) if tokens % 2 else None
        x = activations(tokens, shape[1], dtype, generator)
        product(x, grid, bias, multiprocessors)
