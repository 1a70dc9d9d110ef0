"""Products of int8 activations with int8 weights: exact integers, the native kernel equal to the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from w8a8_weights import INT8, problem_of

from hfq.kernels import dispatch, native, ops, rows16
from hfq.kernels.int8 import MAX_COLUMNS, _cuda_product, int8_linear, integer_product
from hfq.kernels.row import Problem

assert ops.LIBRARY is not None  # defines torch.ops.hfq

# (N, K): rows and columns that fill no block, whole blocks, many blocks.
SHAPES = ((1, 1), (5, 7), (16, 64), (17, 32), (33, 130), (48, 1000), (130, 257))
TOKENS = (0, 1, 3, 8, 9, 70)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")

Kernel = Callable[..., Tensor]


def isas() -> tuple[str, ...]:
    status = native.load()
    return status.isas if status.cpu else ()


def native_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    rows, columns, _ = qweight.shape
    packed = (rows16.to_rows16(qweight), rows16.to_rows16(scales))
    y: Tensor = torch.ops.hfq.cpu_int8_linear(x, *packed, input_scale, bias, columns, rows)
    return y


def reference_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    y: Tensor = torch.ops.hfq.int8_linear(x, qweight, scales, input_scale, bias, qweight.shape[1])
    return y


@pytest.fixture(params=[*isas(), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """The native kernel of each instruction set that this machine runs, and the PyTorch one."""
    if request.param == "reference":
        yield reference_linear
    else:
        with native.use_isa(request.param):
            yield native_linear


def operands(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[N, K, 1]` and scales float32 `[N, 1]`, of either sign."""
    codes = torch.randint(0, 256, (rows, columns, 1), dtype=torch.uint8, generator=generator)
    return codes, torch.randn(rows, 1, generator=generator) * 0.01


def slow(x: Tensor, codes: Tensor, scales: Tensor, input_scale: float | None) -> Tensor:
    """The definition, token by token in Python's integers: float64 `[M, N]`."""
    out = torch.zeros(len(x), len(codes), dtype=torch.float64)
    weight = codes.squeeze(-1).long() - 128
    for m, token in enumerate(x.float()):
        largest = token.abs().max()
        inverse = 127 / largest.item() if input_scale is None else 1 / input_scale
        inverse = torch.tensor(inverse, dtype=torch.float64).float()
        if input_scale is None and largest == 0:
            continue
        steps = (token * inverse).round().clamp(-127, 127).long()
        scale = largest.double() / 127 if input_scale is None else input_scale
        out[m] = (weight @ steps).double() * scale * scales.squeeze(-1).double()
    return out


@pytest.mark.parametrize("input_scale", [None, 0.03125])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(
    kernel: Kernel, shape: tuple[int, int], input_scale: float | None, generator: torch.Generator
) -> None:
    codes, scales = operands(*shape, generator)
    static = None if input_scale is None else torch.tensor([input_scale])
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=generator) * 2
        y = kernel(x, codes, scales, static, None)
        expected = slow(x, codes, scales, input_scale)
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_native_kernel_is_the_reference_to_the_bit(
    kernel: Kernel, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    codes, scales = operands(*shape, generator)
    for tokens in TOKENS:
        x = (torch.randn(tokens, shape[1], generator=generator) * 3).to(dtype)
        x[1:2] = 0
        x[2:3, ::5] *= 100
        for static in (None, torch.tensor([0.02])):
            expected = int8_linear(x, codes, scales, static, None, shape[1])
            y = kernel(x, codes, scales, static, None)
            assert y.dtype == dtype and torch.equal(y, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias(kernel: Kernel, dtype: torch.dtype, generator: torch.Generator) -> None:
    codes, scales = operands(33, 70, generator)
    x = torch.randn(5, 70, generator=generator).to(dtype)
    bias = torch.randn(33, generator=generator).to(dtype)
    expected = int8_linear(x.float(), codes, scales, None, None, 70) + bias.float()
    y = kernel(x, codes, scales, None, bias)
    torch.testing.assert_close(y, expected.to(dtype))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("columns", [4096, 70_000, MAX_COLUMNS])
def test_the_largest_sums_do_not_overflow(kernel: Kernel, columns: int, sign: int) -> None:
    """Code 0 is -128, the largest magnitude; all activations at the end of their range."""
    codes, scales = torch.zeros(2, columns, 1, dtype=torch.uint8), torch.ones(2, 1)
    codes[1] = 255
    x = torch.full((1, columns), 127.0 * sign)
    y = kernel(x, codes, scales, torch.ones(1), None)
    expected = [-128.0 * 127 * columns * sign, 127.0 * 127 * columns * sign]
    assert y.double().tolist() == torch.tensor([expected]).float().double().tolist()


@pytest.mark.parametrize("static", [None, torch.tensor([0.5])], ids=["dynamic", "static"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_number_stays_none(
    kernel: Kernel, value: float, static: Tensor | None, generator: torch.Generator
) -> None:
    codes, scales = operands(20, 45, generator)
    x = torch.randn(11, 45, generator=generator)
    clean = kernel(x, codes, scales, static, None)
    for column in (0, 33, 44):
        spoilt = x.clone()
        spoilt[9, column] = value
        y = kernel(spoilt, codes, scales, static, None)
        assert y[9].isnan().all()
        others = [row for row in range(11) if row != 9]
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF])
def test_an_unusable_static_scale_gives_no_numbers(
    kernel: Kernel, scale: float, generator: torch.Generator
) -> None:
    codes, scales = operands(20, 45, generator)
    x = torch.randn(3, 45, generator=generator)
    assert kernel(x, codes, scales, torch.tensor([scale]), None).isnan().all()


def test_huge_activations(kernel: Kernel, generator: torch.Generator) -> None:
    codes, scales = operands(20, 45, generator)
    x = torch.randn(3, 45, generator=generator)
    y, huge = (kernel(each, codes, scales, None, None) for each in (x, x * 2.0**100))
    assert torch.equal(huge, y * 2.0**100)


# ---- integers


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("columns", [1, 1024, 1025, 5000])
def test_integer_products_are_exact(
    columns: int, precision: str, generator: torch.Generator
) -> None:
    a, b = (
        torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
        for rows in (7, 9)
    )
    a[0], b[0] = -128, -128
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = integer_product(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 40, 64), (33, 9, 130)], ids=str)
def test_padding_for_tensor_cores_changes_nothing(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    """The same function of PyTorch runs on the CPU, where it takes all sizes."""
    tokens, rows, columns = shape
    a, b = (
        torch.randint(-128, 128, (count, columns), generator=generator, dtype=torch.int8)
        for count in (tokens, rows)
    )
    assert torch.equal(_cuda_product(a, b).long(), a.long() @ b.long().T)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 40, 64), (5, 33, 130), (64, 256, 4096)], ids=str)
def test_cuda_products_are_exact(
    cuda: torch.device, shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    tokens, rows, columns = shape
    codes, scales = operands(rows, columns, generator)
    x = torch.randn(tokens, columns, generator=generator)
    x[:1, :1] = NAN
    for static in (None, torch.tensor([0.02])):
        expected = int8_linear(x, codes, scales, static, None, columns)
        on = [None if each is None else each.to(cuda) for each in (x, codes, scales, static)]
        found = int8_linear(*on, None, columns)  # type: ignore[arg-type]
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-9, equal_nan=True)


# ---- as operators of PyTorch


def both(
    generator: torch.Generator,
) -> Iterator[tuple[object, tuple[Tensor, ...], tuple[int, ...]]]:
    codes, scales = operands(24, 37, generator)
    yield torch.ops.hfq.int8_linear, (codes, scales), (37,)
    if isas():
        packed = (rows16.to_rows16(codes), rows16.to_rows16(scales))
        yield torch.ops.hfq.cpu_int8_linear, packed, (37, 24)


@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["dynamic", "static"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(tokens: int, static: Tensor | None, generator: torch.Generator) -> None:
    for op, packed, sizes in both(generator):
        x = torch.randn(tokens, 37, generator=generator, requires_grad=True)
        bias = torch.randn(24, generator=generator, requires_grad=True)
        torch.library.opcheck(op.default, (x, *packed, static, bias, *sizes))  # type: ignore[attr-defined]


def test_the_gradient_is_that_of_the_dequantized_weight(generator: torch.Generator) -> None:
    for op, packed, sizes in both(generator):
        x = torch.randn(5, 37, generator=generator, requires_grad=True)
        bias = torch.randn(24, generator=generator, requires_grad=True)
        grad = torch.randn(5, 24, generator=generator)
        op(x, *packed, None, bias, *sizes).backward(grad)  # type: ignore[operator]
        codes = packed[0] if len(sizes) == 1 else rows16.from_rows16(packed[0], (24, 37, 1))
        scales = packed[1] if len(sizes) == 1 else rows16.from_rows16(packed[1], (24, 1))
        weight = (codes.squeeze(-1).float() - 128) * scales
        torch.testing.assert_close(x.grad, grad @ weight)
        torch.testing.assert_close(bias.grad, grad.sum(0))


def test_the_operator_checks_its_arguments(generator: torch.Generator) -> None:
    if not isas():
        pytest.skip("no native CPU kernels")
    codes, scales = operands(24, 37, generator)
    packed = (rows16.to_rows16(codes), rows16.to_rows16(scales))
    x, op = torch.randn(3, 37, generator=generator), torch.ops.hfq.cpu_int8_linear
    with pytest.raises(RuntimeError, match=r"x must be of shape \[M, in_features=37\]"):
        op(x[:, :36].contiguous(), *packed, None, None, 37, 24)
    with pytest.raises(RuntimeError, match="input_scale must be float32"):
        op(x, *packed, torch.ones(1, dtype=torch.float64), None, 37, 24)
    with pytest.raises(RuntimeError, match=r"input_scale must be of shape \[1\]"):
        op(x, *packed, torch.ones(2), None, 37, 24)
    with pytest.raises(RuntimeError, match="in_features must be at most 131072"):
        op(x, *packed, None, None, 1 << 18, 24)


# ---- the choice of the kernel


def problem(**changed: object) -> Problem:
    return problem_of(INT8, **changed)


def test_int8_activations_have_a_kernel_of_their_own() -> None:
    if not isas():
        pytest.skip("no native CPU kernels")
    for activation in ("dynamic", "static"):
        choice = dispatch.select(problem(activation=activation))
        assert choice.row.name == "cpu_int8"
        assert dict(choice.refused) == {
            "cpu_rows16": f"takes float activations, this weight asks for int8 ({activation})"
        }
    assert dispatch.select(problem(activation=None)).row.name == "cpu_rows16"
    elsewhere = dispatch.select(problem(device="cuda"))
    assert (
        elsewhere.row.name == "dequantize" and "runs on cpu" in dict(elsewhere.refused)["cpu_int8"]
    )
    wide = dispatch.select(problem(in_features=MAX_COLUMNS + 1, group_size=MAX_COLUMNS + 1))
    assert wide.row.name == "dequantize" and "131072 columns" in dict(wide.refused)["cpu_int8"]
