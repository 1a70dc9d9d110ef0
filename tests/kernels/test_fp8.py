"""Products with 8-bit floats: the definition, PyTorch's product on tensor cores (its CPU code here), native CPU kernels, the choice of the kernel.

Native CUDA kernels: test_cuda_w8a8.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from w8a8_weights import FP8, problem_of

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3, e4m3_table, e4m3_values
from hfq.core.weight import Fp8Grid
from hfq.kernels import cpu_fp8, cuda_fp8, dispatch, fp8, fp8_ops, native, rows16
from hfq.kernels.row import Problem

assert fp8_ops.__doc__ is not None  # defines torch.ops.hfq.fp8_*

# (N, K): the last two as tensor cores take them.
SHAPES = ((1, 1), (5, 7), (33, 130), (130, 257), (16, 16), (48, 1008))
TOKENS = (0, 1, 3, 70)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")

Product = Callable[..., Tensor]


def isas() -> tuple[str, ...]:
    status = native.load()
    return status.isas if status.cpu else ()


def in_rows16(name: str) -> Product:
    """An operator for that layout, as a product with the stored weight."""

    def linear(
        x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        rows, columns, _ = codes.shape
        operands = (rows16.to_rows16(codes), rows16.to_rows16(scales), e4m3_table())
        tokens = x.reshape(-1, columns).contiguous()
        op = getattr(torch.ops.hfq, name)
        y: Tensor = op(tokens, *operands, input_scale, bias, columns, rows)
        return y.view(*x.shape[:-1], rows)

    return linear


@pytest.fixture(
    params=[
        *("reference", "scaled", "widened"),
        *(f"{name} {isa}" for isa in isas() for name in ("direct", "dequantized")),
    ]
)
def product(request: pytest.FixtureRequest) -> Iterator[Product]:
    products: dict[str, Product] = {
        "reference": fp8.linear,
        "scaled": fp8.scaled_linear,
        "widened": fp8.widened_linear,
        "direct": in_rows16("cpu_fp8_linear"),
        "dequantized": in_rows16("cpu_fp8_linear_dequantized"),
    }
    name, _, isa = request.param.partition(" ")
    with native.use_isa(isa or "auto") if isas() else contextlib.nullcontext():
        yield products[name]


def operands(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes uint8 `[N, K, 1]` and scales float32 `[N, 1]`."""
    codes = torch.randint(0, 127, (rows, columns, 1), generator=generator)
    signs = torch.randint(0, 2, codes.shape, generator=generator) * 128
    return (codes + signs).to(torch.uint8), torch.rand(rows, 1, generator=generator) * 0.01


def weight_of(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.squeeze(-1).view(E4M3).double() * scales.double()


def defined(x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None) -> Tensor:
    """The definition in float64: `[M, N]`."""
    rounded, token_scales = quantize_tokens(x, input_scale, E4M3)
    return (rounded.double() * token_scales.double()) @ weight_of(codes, scales).T


def tolerance(product: Product, expected: Tensor) -> float:
    """Of single values beside the largest: sums in float32, and bfloat16 of the product on tensor cores."""
    largest = expected.abs().max().item() if expected.numel() else 1.0
    return largest * (2**-8 if product is fp8.scaled_linear else 1e-5)


@pytest.mark.parametrize("static", [None, torch.tensor([0.004])], ids=["dynamic", "static"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(
    product: Product, shape: tuple[int, int], static: Tensor | None, generator: torch.Generator
) -> None:
    codes, scales = operands(*shape, generator)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=generator) * 2
        x[1:2] = 0
        for dtype in FLOATS:
            y = product(x.to(dtype), codes, scales, static, None)
            expected = defined(x.to(dtype), codes, scales, static)
            assert y.dtype == dtype and y.shape == expected.shape
            atol = max(tolerance(product, expected), tolerance(fp8.scaled_linear, expected))
            atol = atol if dtype == torch.bfloat16 else tolerance(product, expected)
            atol = max(atol, expected.abs().max().item() * 2**-11) if tokens else atol
            atol += torch.finfo(dtype).tiny * torch.finfo(dtype).eps
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)


def test_bias_and_other_shapes(product: Product, generator: torch.Generator) -> None:
    codes, scales = operands(32, 64, generator)
    bias = torch.randn(32, generator=generator)
    x = torch.randn(2, 3, 64, generator=generator)
    expected = defined(x.view(6, 64), codes, scales, None).view(2, 3, 32) + bias.double()
    atol = tolerance(product, expected)
    for each in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
        y = product(each, codes, scales, None, bias)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)
    y = product(x[0, 0], codes, scales, None, bias)
    torch.testing.assert_close(y.double(), expected[0, 0], rtol=0, atol=atol)


@pytest.mark.parametrize("static", [None, torch.tensor([0.5])], ids=["dynamic", "static"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_number_stays_none(
    product: Product, value: float, static: Tensor | None, generator: torch.Generator
) -> None:
    codes, scales = operands(32, 48, generator)
    x = torch.randn(11, 48, generator=generator)
    clean = product(x, codes, scales, static, None)
    x[9, 33] = value
    y = product(x, codes, scales, static, None)
    assert y[9].isnan().all()
    others = [row for row in range(11) if row != 9]
    assert torch.equal(y[others], clean[others])


def test_rows_of_zeros(product: Product, generator: torch.Generator) -> None:
    codes, scales = operands(16, 32, generator)
    codes[3], scales[3] = 0, 0
    y = product(torch.randn(4, 32, generator=generator), codes, scales, None, None)
    assert bool(y.isfinite().all()) and not y[:, 3].any()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_faster_float32_products_change_nothing(precision: str, generator: torch.Generator) -> None:
    codes, scales = operands(33, 300, generator)
    x = torch.randn(7, 300, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y = fp8.linear(x, codes, scales, None, None)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = defined(x, codes, scales, None)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance(fp8.linear, expected))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dequantize(dtype: torch.dtype, generator: torch.Generator) -> None:
    codes, scales = operands(24, 37, generator)
    found = fp8.dequantize(codes, scales, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, weight_of(codes, scales).float().to(dtype))
    stack = fp8.dequantize(codes.view(2, 12, 37, 1), scales.view(2, 12, 1), dtype)
    assert torch.equal(stack, found.view(2, 12, 37))
    assert fp8.dequantize(codes[:0], scales[:0], dtype).shape == (0, 37)


def test_dequantize_in_pieces(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = operands(24, 37, generator)
    whole = fp8.dequantize(codes, scales, torch.float32)
    x = torch.randn(5, 37, generator=generator)
    expected = x @ whole.T
    for chunk in (1, 100, 1000):
        monkeypatch.setattr(fp8, "_CHUNKS", {"cpu": chunk})
        assert torch.equal(fp8.dequantize(codes, scales, torch.float32), whole)
        torch.testing.assert_close(fp8.product(x, codes, scales), expected)


# ---- native CPU kernels


@pytest.fixture(
    params=isas() or [pytest.param(None, marks=pytest.mark.skip("no native CPU kernels"))]
)
def row(request: pytest.FixtureRequest) -> Iterator[cpu_fp8.CpuFp8]:
    with native.use_isa(request.param):
        yield cpu_fp8.CpuFp8()


def grid_of(codes: Tensor, scales: Tensor, **more: Any) -> Fp8Grid:
    rows, columns = codes.shape[-3:-1]
    sizes = {"in_features": columns, "out_features": rows}
    return Fp8Grid(qweight=codes, scales=scales, values=e4m3_table(), **sizes, **more)


def prepared(row: cpu_fp8.CpuFp8, stored: Fp8Grid) -> Fp8Grid:
    qweight, scales = (row.prepare(each, 8) for each in (stored.qweight, stored.scales))
    return replace(stored, qweight=qweight, scales=scales)


STATIC = torch.tensor([0.004])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("static", [None, STATIC], ids=["dynamic", "static"])
def test_tokens_are_rounded_to_the_bit(
    row: cpu_fp8.CpuFp8, static: Tensor | None, dtype: torch.dtype, generator: torch.Generator
) -> None:
    for tokens, columns in ((0, 5), (1, 1), (7, 16), (9, 31), (40, 333)):
        x = torch.randn(tokens, columns, generator=generator) * 2
        # Ties, what rounds up to the next power of two, subnormal E4M3, zeros, tiny and huge tokens.
        x[1:2] *= 0.25
        x[2:3] = (torch.arange(columns) - 7) * 2.0**-10
        x[3:4], x[4:5] = 0, 1e-37
        x[5:6] *= 1e30 if dtype != torch.float16 else 1e4
        x[6:7, ::2] *= 1e-3
        x[8:9, -1:] = NAN
        x = x.to(dtype)
        for step in (static, None if static is None else torch.tensor([2.0**-3])):
            values, scales = torch.ops.hfq.cpu_fp8_round_tokens(x, step)
            codes, expected = quantize_tokens(x, step, E4M3)
            torch.testing.assert_close(scales, expected, rtol=0, atol=0, equal_nan=True)
            known = ~expected.isnan().squeeze(1)
            assert torch.equal(values[known], codes.float()[known])


def test_all_values_are_rounded_as_pytorch_does(row: cpu_fp8.CpuFp8) -> None:
    exact = e4m3_values(torch.arange(127, dtype=torch.uint8))
    middle = (exact[1:] + exact[:-1]) / 2
    near = torch.cat([middle, *(middle.nextafter(torch.tensor(way)) for way in (0.0, INF))])
    x = torch.cat([exact, near, -exact, -near, torch.tensor([448.0, 449, -1e30])]).view(1, -1)
    values, _ = torch.ops.hfq.cpu_fp8_round_tokens(x, torch.ones(1))
    assert torch.equal(values, x.clamp(-448, 448).to(E4M3).float())


@pytest.mark.parametrize("activation", [None, "dynamic", "static"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_tokens(
    row: cpu_fp8.CpuFp8, shape: tuple[int, int], activation: str | None, generator: torch.Generator
) -> None:
    codes, scales = operands(*shape, generator)
    static = STATIC if activation == "static" else None
    stored = grid_of(codes, scales, activation=activation, input_scale=static)
    ready = prepared(row, stored)
    bias = torch.randn(shape[0], generator=generator)
    for tokens in (0, 1, 2, 3, 4, 5, 8, 9, 16, 33, 65, 300):
        for dtype in (*FLOATS, torch.float64):
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            y = row.linear(x, ready, bias.to(dtype), True)
            if activation is None:
                wanted = x.double() @ weight_of(codes, scales).T
            else:
                wanted = defined(x, codes, scales, static)
            wanted = wanted + bias.to(dtype).double()
            assert y.dtype == dtype and y.shape == wanted.shape
            largest = wanted.abs().max().item() if tokens else 1.0
            step = max(torch.finfo(dtype).eps, 2**-18)
            torch.testing.assert_close(y.double(), wanted, rtol=0, atol=largest * step)


@pytest.mark.parametrize("activation", [None, "dynamic"])
def test_codes_that_are_nan_give_nan(
    row: cpu_fp8.CpuFp8, activation: str | None, generator: torch.Generator
) -> None:
    """As everywhere in random codes; and a single one, whatever it meets."""
    for rows, columns in ((16, 16), (33, 130), (5, 7)):
        codes = torch.randint(0, 256, (rows, columns, 1), dtype=torch.uint8, generator=generator)
        scales = torch.rand(rows, 1, generator=generator)
        for only in (False, True):
            if only:
                codes[codes & 127 == 127] = 1
                codes[rows // 2, columns - 1] = 255
            stored = grid_of(codes, scales, activation=activation)
            ready = prepared(row, stored)
            none = (codes & 127 == 127).squeeze(-1)
            assert torch.equal(none, fp8.dequantize(codes, scales, torch.float32).isnan())
            for dtype in FLOATS:
                assert torch.equal(row.dequantize(ready, dtype).isnan(), none)
                for tokens in (1, 2, 9, 70):
                    x = torch.randn(tokens, columns, generator=generator).to(dtype)
                    x[:, -1] = 0
                    y = row.linear(x, ready, None, False)
                    assert torch.equal(y.isnan(), none.any(1).expand(tokens, -1))
                    assert bool((y.isfinite() | y.isnan()).all())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_activations_as_they_are_keep_what_is_no_number(
    row: cpu_fp8.CpuFp8, value: float, generator: torch.Generator
) -> None:
    codes, scales = operands(33, 45, generator)
    ready = prepared(row, grid_of(codes, scales))
    for tokens in (1, 3, 9, 70):
        for dtype in FLOATS:
            x = torch.randn(tokens, 45, generator=generator).to(dtype)
            x[-1, 44] = value
            finite = row.linear(x, ready, None, False).isfinite()
            assert not finite[-1].any() and bool(finite[:-1].all())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weight_and_its_rows_to_the_bit(
    row: cpu_fp8.CpuFp8, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    codes, scales = operands(*shape, generator)
    scales[0] = 5e35  # as large as that of finite weights can be
    ready = prepared(row, grid_of(codes, scales))
    expected = fp8.dequantize(codes, scales, dtype)
    assert torch.equal(row.dequantize(ready, dtype), expected)
    for count in (0, 1, 35):
        index = torch.randint(shape[0], (count,), generator=generator)
        assert torch.equal(row.lookup(ready, index, dtype), expected[index])
        assert torch.equal(row.lookup(ready, index.int(), dtype), expected[index])
    assert torch.equal(row.restore(ready.qweight, codes.shape, 8), codes)
    assert torch.equal(row.restore(ready.scales, scales.shape, 8), scales)


@pytest.mark.parametrize("activation", [None, "dynamic", "static"])
def test_stacks_of_experts(
    row: cpu_fp8.CpuFp8, activation: str | None, generator: torch.Generator
) -> None:
    made = [operands(35, 50, generator) for _ in range(4)]
    codes, scales = (torch.stack(each) for each in zip(*made, strict=True))
    static = torch.rand(4, 1, generator=generator) * 0.01 if activation == "static" else None
    ready = prepared(row, grid_of(codes, scales, activation=activation, input_scale=static))
    bias = torch.randn(4, 35, generator=generator)
    for counts in ([3, 0, 1, 40], [0, 0, 2, 0], [70, 1, 0, 0]):
        x = torch.randn(sum(counts), 50, generator=generator)
        for learns in (False, True):
            own = x.clone().requires_grad_(learns)
            y = row.experts(own, torch.tensor(counts), ready, bias, False)
            parts = [
                row.linear(part, ready.expert(e), bias[e], False)
                for e, part in enumerate(x.split(counts))
            ]
            torch.testing.assert_close(y, torch.cat(parts))
            assert y.requires_grad == learns


def test_siblings_share_a_product(row: cpu_fp8.CpuFp8, generator: torch.Generator) -> None:
    for activation in (None, "dynamic"):
        made = [operands(rows, 70, generator) for rows in (32, 16, 48)]
        grids = [prepared(row, grid_of(*each, activation=activation)) for each in made]
        found = row.stack(grids)
        assert found is not None
        whole, parts = found
        x = torch.randn(3, 70, generator=generator)
        each = [row.linear(x, part, None, False) for part in parts]
        assert torch.equal(row.linear(x, whole, None, False), torch.cat(each, 1))
    assert (
        row.stack([replace(grid, activation="static", input_scale=STATIC) for grid in grids])
        is None
    )
    odd = prepared(row, grid_of(*operands(33, 70, generator), activation="dynamic"))
    assert row.stack([odd, *grids]) is None


@pytest.mark.parametrize("activation", [None, "dynamic"])
def test_native_gradients(
    row: cpu_fp8.CpuFp8, activation: str | None, generator: torch.Generator
) -> None:
    codes, scales = operands(32, 48, generator)
    ready = prepared(row, grid_of(codes, scales, activation=activation))
    for tokens in (5, 70):
        x = torch.randn(tokens, 48, generator=generator, requires_grad=True)
        bias = torch.randn(32, generator=generator, requires_grad=True)
        grad = torch.randn(tokens, 32, generator=generator)
        row.linear(x, ready, bias, False).backward(grad)
        torch.testing.assert_close(x.grad, grad @ weight_of(codes, scales).float())
        torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("static", [None, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_native_opcheck(tokens: int, static: Tensor | None, generator: torch.Generator) -> None:
    codes, scales = operands(32, 48, generator)
    x = torch.randn(tokens, 48, generator=generator, requires_grad=True)
    bias = torch.randn(32, generator=generator, requires_grad=True)
    stored = (rows16.to_rows16(codes), rows16.to_rows16(scales), e4m3_table())
    ops = torch.ops.hfq
    if isas():
        for op in (ops.cpu_fp8_linear, ops.cpu_fp8_linear_dequantized):
            torch.library.opcheck(op.default, (x, *stored, static, bias, 48, 32))
    torch.library.opcheck(ops.cpu_fp8_round_tokens.default, (x.detach(), static))


def test_the_operators_check_their_arguments(generator: torch.Generator) -> None:
    if not isas():
        pytest.skip("no native CPU kernels")
    codes, scales = operands(24, 37, generator)
    stored = (rows16.to_rows16(codes), rows16.to_rows16(scales))
    table, x, ops = e4m3_table(), torch.randn(3, 37, generator=generator), torch.ops.hfq
    for arguments, message in (
        (
            (x[:, :36].contiguous(), *stored, table, None, None, 37, 24),
            r"x must be of shape \[M, in_features=37\]",
        ),
        ((x, *stored, table[:16], None, None, 37, 24), r"codebook must be of shape \[256\]"),
        ((x, *stored, -table, None, None, 37, 24), "must be that of E4M3"),
        ((x, *stored, table, torch.ones(2), None, 37, 24), r"input_scale must be of shape \[1\]"),
        ((x, *stored, table, torch.ones(1).double(), None, 37, 24), "input_scale must be float32"),
        ((x, *stored, table, None, torch.ones(23), 37, 24), "bias must be of shape"),
        ((x, *stored, table, None, None, 41, 24), "qweight must be of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.cpu_fp8_linear(*arguments)
    for tokens, message in (
        (x[0], r"x must be of shape \[M, K\]"),
        (x[:, :0], r"x must be of shape \[M, K\]"),
        (x.double(), "x must be float32"),
        (x[:, ::2], "x must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.cpu_fp8_round_tokens(tokens, None)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 16), (64, 256), (1024, 4096)], ids=str)
def test_on_a_gpu(cuda: torch.device, shape: tuple[int, int], generator: torch.Generator) -> None:
    codes, scales = operands(*shape, generator)
    grid = Fp8Grid(
        qweight=codes.to(cuda),
        scales=scales.to(cuda),
        values=e4m3_table(cuda),
        in_features=shape[1],
        out_features=shape[0],
        activation="dynamic",
    )
    row = cuda_fp8.CudaFp8Library()
    reason = row.reject(Problem.of(grid))
    if reason is not None:
        pytest.skip(reason)
    for tokens in (0, 1, 5, 64, 300):
        for dtype in FLOATS:
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            expected = defined(x, codes, scales, None)
            y = row.linear(x.to(cuda), grid, None, False).cpu().double()
            atol = tolerance(fp8.scaled_linear, expected)
            torch.testing.assert_close(y, expected, rtol=0, atol=atol)


# ---- as operators of PyTorch


@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["dynamic", "static"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(tokens: int, static: Tensor | None, generator: torch.Generator) -> None:
    codes, scales = operands(32, 48, generator)
    x = torch.randn(tokens, 48, generator=generator, requires_grad=True)
    bias = torch.randn(32, generator=generator, requires_grad=True)
    ops = torch.ops.hfq
    for rounded in (False, True):
        torch.library.opcheck(ops.fp8_linear.default, (x, codes, scales, static, bias, rounded))
    for op in (ops.fp8_scaled_linear, ops.fp8_widened_linear):
        torch.library.opcheck(op.default, (x, codes, scales, static, bias))
    torch.library.opcheck(ops.fp8_dequantize.default, (codes, scales, torch.bfloat16))


def test_the_gradient_is_that_of_the_dequantized_weight(generator: torch.Generator) -> None:
    codes, scales = operands(32, 48, generator)
    x = torch.randn(5, 48, generator=generator)
    grad = torch.randn(5, 32, generator=generator)
    for op, rest in (
        (torch.ops.hfq.fp8_linear, (False,)),
        (torch.ops.hfq.fp8_linear, (True,)),
        (torch.ops.hfq.fp8_scaled_linear, ()),
        (torch.ops.hfq.fp8_widened_linear, ()),
    ):
        own = x.clone().requires_grad_()
        bias = torch.randn(32, generator=generator, requires_grad=True)
        op(own, codes, scales, None, bias, *rest).backward(grad)
        torch.testing.assert_close(own.grad, grad @ weight_of(codes, scales).float())
        torch.testing.assert_close(bias.grad, grad.sum(0))


# ---- the choice of the kernel


def problem(**changed: object) -> Problem:
    return problem_of(FP8, **{"device": "cuda", **changed})


@pytest.mark.parametrize("found", [(8, 9), (9, 0), (10, 0), (10, 3)])
def test_tensor_cores_are_used_where_there_are_some(
    found: tuple[int, int], machine: Callable[..., None]
) -> None:
    machine(found, kernels=False)
    row = cuda_fp8.CudaFp8Library()
    assert row.reject(problem()) is None and row.reject(problem(activation="static")) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cpu"}, "runs on cuda, the weight is on cpu"),
        ({"activation": None}, "takes fp8 activations, this weight does not ask for them"),
        ({"in_features": 40}, "takes rows and columns in multiples of 16, not 32 x 40"),
        ({"out_features": 33}, "takes rows and columns in multiples of 16, not 33 x 64"),
    ],
)
def test_other_weights_are_refused_in_words(
    changed: dict[str, object], reason: str, machine: Callable[..., None]
) -> None:
    machine((9, 0), kernels=False)
    for row in (cuda_fp8.CudaFp8(), cuda_fp8.CudaFp8Library()):
        assert row.reject(problem(**changed)) == reason


@pytest.mark.parametrize("found", [(8, 0), (8, 6), (11, 0), (12, 0)])
def test_other_gpus_are_refused_in_words(
    found: tuple[int, int], machine: Callable[..., None]
) -> None:
    machine((9, 0), found, kernels=False)
    for row in (cuda_fp8.CudaFp8(), cuda_fp8.CudaFp8Library()):
        reason = row.reject(problem())
        assert reason is not None and reason.endswith(f"one here has {found[0]}.{found[1]}")


def test_on_the_cpu_native_kernels_are_used() -> None:
    if not isas():
        pytest.skip("no native CPU kernels")
    for activation in (None, "dynamic", "static"):
        choice = dispatch.select(problem(device="cpu", activation=activation))
        assert choice.row.name == "cpu_fp8" and not choice.refused
    empty = dispatch.select(problem(device="cpu", in_features=0))
    assert empty.row.name == "dequantize_fp8"
    assert dict(empty.refused)["cpu_fp8"] == "takes weights with columns, not without any"
    assert cpu_fp8.CpuFp8().reject(problem()) == "runs on cpu, the weight is on cuda"


def test_without_native_code_weights_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = native.NativeStatus(cpu=False, cuda=False, cpu_reason="no compiler was found")
    monkeypatch.setattr(native, "load", lambda: absent)
    dispatch.select.cache_clear()
    for activation in (None, "dynamic", "static"):
        choice = dispatch.select(problem(device="cpu", activation=activation))
        assert choice.row.name == "dequantize_fp8"
        reasons = dict.fromkeys(
            ("cuda_fp8", "cuda_fp8_library", "cuda_fp8_widened", "cuda_fp8_weights"),
            "runs on cuda, the weight is on cpu",
        )
        reasons["cpu_fp8"] = "native CPU kernels are not loaded: no compiler was found"
        assert dict(choice.refused) == reasons
    dispatch.select.cache_clear()


def test_float32_stays_exact_on_tensor_cores(generator: torch.Generator) -> None:
    """The row's own code, on tensors of the CPU: its product rounds to bfloat16, so float32 goes another way."""
    codes, scales = operands(32, 48, generator)
    grid = Fp8Grid(
        qweight=codes,
        scales=scales,
        values=e4m3_table(),
        in_features=48,
        out_features=32,
        activation="dynamic",
    )
    x = torch.randn(3, 48, generator=generator)
    row = cuda_fp8.CudaFp8Library()
    assert torch.equal(row.linear(x, grid, None, False), fp8.linear(x, codes, scales, None, None))
    half = x.bfloat16()
    expected = fp8.scaled_linear(half, codes, scales, None, None)
    assert torch.equal(row.linear(half, grid, None, False), expected)
