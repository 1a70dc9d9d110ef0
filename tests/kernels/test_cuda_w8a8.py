"""Activations of 8 bits on a GPU, int8 and E4M3: operators, kernel row and modules against the PyTorch reference; CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_gpu import captured, check_overlap, quantized
from w8a8_weights import FLOATS, FP8, INT8, ROWS, WIDENED, K, Kind, check_schemas, equal, prepared

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3
from hfq.kernels.cuda_fp8 import MAX_DIRECT_TOKENS
from hfq.kernels.row import Problem

pytestmark = pytest.mark.gpu

MODELS = (
    (1, 16),
    (33, 144),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (151, 28672),
    (160, 28672),
)

Move = Callable[[Any], Any]


@pytest.fixture(params=ROWS, ids=str)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def there(kind: Kind, cuda: torch.device, generator: torch.Generator) -> Move:
    """Moves a grid to the GPU."""
    reason = kind.row.reject(replace(Problem.of(kind.stored(generator)), device="cuda"))
    if reason is not None:
        pytest.skip(reason)

    def move(grid: Any) -> Any:
        static = None if grid.input_scale is None else grid.input_scale.to(cuda)
        moved = {name: getattr(grid, name).to(cuda) for name in ("qweight", "scales")}
        if hasattr(grid, "values"):
            moved["values"] = grid.values.to(cuda)
        return replace(grid, **moved, input_scale=static)

    return move


@pytest.mark.parametrize("shape", MODELS, ids=str)
@pytest.mark.parametrize("static", [None, 0.02])
def test_products(
    kind: Kind,
    there: Move,
    generator: torch.Generator,
    shape: tuple[int, int],
    static: float | None,
) -> None:
    """E4M3: an error of 2^-24 of all that has been added for each of K / 128 steps of a warp (the tensor cores cut off), twice."""
    grid = there(kind.stored(generator, *shape, static=static))
    ready, device = prepared(kind, grid), grid.qweight.device
    for dtype in FLOATS:
        for tokens in (0, 1, 2, 4, 5, 8, 13, 32, 33, 100):
            x = torch.randn(tokens, shape[1], generator=generator)
            x[1:2] = 0
            x[2:3, ::5] *= 100
            x[3:4, -1] = torch.nan
            bias = torch.randn(shape[0], generator=generator) if tokens % 2 else None
            x, bias = x.to(device, dtype), None if bias is None else bias.to(device, dtype)
            for product in kind.products:
                y = product(x, *kind.arguments(ready, bias))
                kind.check(y, x, grid, bias, roundings=16 + shape[1] / 64)
                assert equal(y, product(x, *kind.arguments(ready, bias))), "sums are in one order"


@pytest.mark.parametrize("columns", [16, 4096, 14336, 16384, 28672, 131072])
def test_tokens_are_those_of_the_cpu(
    kind: Kind, there: Move, cuda: torch.device, generator: torch.Generator, columns: int
) -> None:
    for dtype in FLOATS:
        sizes = torch.tensor([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1])
        x = torch.randn(7, columns, generator=generator) * sizes[:, None]
        x[6, :8] = torch.tensor([0.0, -0.0, 1e-9, -1e-9, torch.nan, -torch.nan, 1e30, -1e30])
        x[5, -1] = torch.inf
        x = x.to(dtype)
        for static in (None, torch.tensor([0.02]), torch.tensor([0.0])):
            wanted = quantize_tokens(x, static, kind.dtype)
            on_gpu = None if static is None else static.to(cuda)
            found = [kind.quantize_tokens(x.to(cuda), on_gpu)]
            if kind is INT8:
                found.append(quantize_tokens(x.to(cuda), on_gpu))
            for codes, scales in found:
                assert torch.equal(codes.view(torch.uint8).cpu(), wanted[0].view(torch.uint8))
                torch.testing.assert_close(scales.cpu(), wanted[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 16), (33, 144), (70, 2064), (4096, 4096)], ids=str)
def test_dequantize(
    kind: Kind, there: Move, generator: torch.Generator, shape: tuple[int, int]
) -> None:
    grid = there(kind.stored(generator, *shape))
    ready, wanted = prepared(kind, grid), kind.weight(grid)
    for dtype in FLOATS:
        assert torch.equal(kind.dequantize(ready.qweight, ready.scales, dtype), wanted.to(dtype))
    if kind is not INT8 and grid.qweight.numel() > 108:  # int8 has pieces of 16 columns
        part = grid.qweight.flatten()[3:][: 7 * 15].view(7, 15, 1)
        y = kind.dequantize(part, grid.scales[:1].expand(7, 1).contiguous(), torch.float32)
        assert torch.equal(y, part.squeeze(-1).view(E4M3).float() * grid.scales[0])


@pytest.mark.parametrize("kind", [FP8], ids=str)
def test_many_tokens(kind: Kind, there: Move, generator: torch.Generator) -> None:
    grid = there(kind.stored(generator, 1024, 4096))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(100, 4096, generator=generator).to(grid.qweight.device, dtype)
        y = kind.row.linear(x, grid, None, False).double()
        parts = [kind.row.linear(part, grid, None, False) for part in x.split(25)]
        few = torch.cat(parts).double()
        # Both round to bfloat16, the matrix library before the bias.
        torch.testing.assert_close(y, few, rtol=0, atol=few.abs().max().item() * 2**-7)


@pytest.mark.parametrize("kind", [WIDENED], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 140), (1023, 4090), (4096, 4096)], ids=str)
@pytest.mark.parametrize("static", [None, 0.02])
def test_any_shape_is_widened(
    kind: Kind,
    there: Move,
    generator: torch.Generator,
    shape: tuple[int, int],
    static: float | None,
) -> None:
    """Few and many tokens, in several parts of rows, and experts: one rounding behind float32 sums."""
    rows, columns = shape
    grid = there(kind.stored(generator, rows, columns, static=static))
    ready, device = prepared(kind, grid), grid.qweight.device
    for dtype in FLOATS:
        for tokens in (0, 1, 5, 40, 128, 129, 9000):
            x = torch.randn(tokens, columns, generator=generator).to(device, dtype)
            bias = torch.randn(rows, generator=generator).to(device, dtype) if tokens % 2 else None
            with torch.autocast("cuda", torch.float16, enabled=tokens % 2 == 0):
                y = kind.row.linear(x, ready, bias, False)
            kind.check(y, x, grid, bias, roundings=16 + columns / 16)
    scales = None if grid.input_scale is None else grid.input_scale.repeat(3, 1)
    qweight, weight_scales = (each.expand(3, *each.shape) for each in (grid.qweight, grid.scales))
    stack = replace(
        grid, qweight=qweight.contiguous(), scales=weight_scales.contiguous(), input_scale=scales
    )
    experts = prepared(kind, stack)
    for counts in ((3, 0, 4), (0, 150, 9)):
        x = torch.randn(sum(counts), columns, generator=generator).to(device, torch.bfloat16)
        y = kind.row.experts(x, torch.tensor(counts, device=device), experts, None, False)
        kind.check(y, x, grid, None, roundings=16 + columns / 16)


@pytest.mark.parametrize("tokens", [1, 4, 8, 32])
def test_products_that_overlap(
    kind: Kind,
    there: Move,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
) -> None:
    """Each reads what the one before gives, which it rounds itself or another kernel does: as if they did not overlap."""
    weights = []
    for shape in ((3072, 4096), (4096, 3072)) * 3:
        grid = there(kind.stored(generator, *shape))
        largest = torch.linalg.matrix_norm(kind.weight(grid).float(), 2)
        # Outputs grow to twice their size at most: 2^48 in all.
        weights.append(prepared(kind, replace(grid, scales=grid.scales * (2 / largest))))
    x = torch.randn(tokens, 4096, generator=generator).to(grid.qweight.device, torch.bfloat16)

    def product(weight: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: kind.row.linear(x, weight, None, False)

    check_overlap([product(weight) for weight in weights], x, monkeypatch)


def test_in_a_cuda_graph(
    kind: Kind, there: Move, cuda: torch.device, generator: torch.Generator
) -> None:
    grid = there(kind.stored(generator, 1024, 4096))
    row, ready = kind.row, prepared(kind, grid)
    for tokens in (1, 8, 64, 200):
        x = torch.randn(tokens, 4096, generator=generator).to(cuda, torch.bfloat16)
        with torch.no_grad():
            graph, y = captured(lambda x=x: row.linear(x, ready, None, False))  # type: ignore[misc]
        for _ in range(2):
            x.copy_(torch.randn(tokens, 4096, generator=generator))
            graph.replay()
            if kind is INT8:
                assert torch.equal(y, kind.expected(x, grid))
                continue
            # The matrix library may choose another algorithm in a graph.
            close = 0 if tokens <= MAX_DIRECT_TOKENS else y.abs().max().item() * 2**-7
            torch.testing.assert_close(y, row.linear(x, ready, None, False), rtol=0, atol=close)


def test_opcheck(kind: Kind, there: Move, cuda: torch.device, generator: torch.Generator) -> None:
    ready = prepared(kind, there(kind.stored(generator)))
    for tokens in (0, 3, 40):
        x = torch.randn(tokens, K, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
        check_schemas(kind, ready, x)


@pytest.mark.usefixtures("there")
def test_modules(kind: Kind, cuda: torch.device, generator: torch.Generator) -> None:
    """Few and many tokens, gradients, and the way to the CPU and back."""
    # The matrix library takes E4M3 in multiples of 16 rows; what it does not take is widened on any GPU.
    packed = quantized(K, 80 if kind is FP8 else 72, kind.format, kind.spec, generator)
    saved = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    xs = [torch.randn(tokens, K, generator=generator).bfloat16() for tokens in (1, 8, 40)]
    on_cpu = [packed(x) for x in xs]
    packed.to(cuda)
    assert packed.kernel_choice("weight").row.name == kind.row.name
    weight = packed.dequantize().double()
    for x, wanted in zip(xs, on_cpu, strict=True):
        there_x = x.to(cuda).requires_grad_()
        y = packed(there_x)
        # The CPU's kernel may add the bias in one step with the product.
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-2, atol=1e-2)
        grad = torch.randn(y.shape, generator=generator).to(cuda, torch.bfloat16)
        y.backward(grad)
        assert there_x.grad is not None
        torch.testing.assert_close(
            there_x.grad.double(), grad.double() @ weight, rtol=1e-2, atol=2e-2
        )
    packed.to("cpu")
    for name, tensor in packed.state_dict().items():
        bits = [one.reshape(-1).view(torch.uint8) for one in (tensor, saved[name])]
        assert torch.equal(*bits), name
