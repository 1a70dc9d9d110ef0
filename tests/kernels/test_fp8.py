"""Products with 8-bit floats: the definition, PyTorch's product on tensor cores (its CPU code here), the choice of the kernel.

Native CUDA kernels: test_cuda_w8a8.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from w8a8_weights import FP8, problem_of

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3, e4m3_table
from hfq.core.weight import Fp8Grid
from hfq.kernels import cuda_fp8, dispatch, fp8, fp8_ops
from hfq.kernels.row import Problem

assert fp8_ops.__doc__ is not None  # defines torch.ops.hfq.fp8_*

# (N, K): the last two as tensor cores take them.
SHAPES = ((1, 1), (5, 7), (33, 130), (130, 257), (16, 16), (48, 1008))
TOKENS = (0, 1, 3, 70)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")

Product = Callable[..., Tensor]


@pytest.fixture(params=["reference", "scaled", "widened"])
def product(request: pytest.FixtureRequest) -> Product:
    products: dict[str, Product] = {
        "reference": fp8.linear,
        "scaled": fp8.scaled_linear,
        "widened": fp8.widened_linear,
    }
    return products[request.param]


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


def test_on_the_cpu_weights_are_dequantized() -> None:
    for activation in (None, "dynamic", "static"):
        choice = dispatch.select(problem(device="cpu", activation=activation))
        assert choice.row.name == "dequantize_fp8"
        reasons = dict.fromkeys(
            ("cuda_fp8", "cuda_fp8_library", "cuda_fp8_widened", "cuda_fp8_weights"),
            "runs on cuda, the weight is on cpu",
        )
        assert dict(choice.refused) == reasons


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
