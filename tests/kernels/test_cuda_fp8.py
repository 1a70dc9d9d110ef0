"""The native kernels of format fp8 with E4M3 activations: the kernel row on the CPU, where PyTorch's code stands for them; on a GPU themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3, e4m3_table
from hfq.core.spec import Fp8Spec
from hfq.core.weight import Fp8Grid
from hfq.kernels import cuda_fp8, dispatch, fp8, native
from hfq.kernels.row import Problem
from hfq.nn.linear import QuantLinear

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
N, K = 48, 144


def stored(
    generator: torch.Generator, rows: int = N, columns: int = K, static: float | None = None
) -> Fp8Grid:
    """A random weight without NaN."""
    codes = torch.randint(0, 127, (rows, columns, 1), generator=generator)
    signs = torch.randint(0, 2, codes.shape, generator=generator) * 128
    return Fp8Grid(
        qweight=(codes + signs).to(torch.uint8),
        scales=torch.rand(rows, 1, generator=generator) * 0.01,
        values=e4m3_table(),
        in_features=columns,
        out_features=rows,
        activation="dynamic" if static is None else "static",
        input_scale=None if static is None else torch.tensor([static]),
    )


def operands(grid: Fp8Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    return grid.qweight, grid.scales, grid.input_scale


def check(y: Tensor, x: Tensor, grid: Fp8Grid, bias: Tensor | None = None) -> None:
    """Each number beside the definition in float64: as far off as float32 sums in any order may be, and the result's rounding."""
    rounded, token_scales = quantize_tokens(x, grid.input_scale, E4M3)
    left, right = rounded.double(), grid.qweight.squeeze(-1).view(E4M3).double()
    factors = token_scales.double() * grid.scales.double().T
    expected, size = left @ right.T * factors, left.abs() @ right.abs().T * factors.abs()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    # An error of 2^-24 of all that has been added for each of K / 128 steps of a warp (the tensor cores cut off, where they may), twice.
    allowed = size * (16 + x.shape[1] / 64) * 2**-24 + torch.finfo(x.dtype).eps * expected.abs()
    allowed += torch.finfo(x.dtype).tiny
    assert y.dtype == x.dtype and y.shape == expected.shape
    none = expected.isnan()
    assert torch.equal(y.isnan(), none)
    overflowed = expected.abs() > torch.finfo(x.dtype).max
    error = (y.double() - expected).abs()
    assert bool((none | (error <= allowed) | (overflowed & y.isinf())).all())


# ---- the kernel row


@pytest.mark.parametrize("static", [None, 0.02])
def test_row(generator: torch.Generator, static: float | None) -> None:
    row, grid = cuda_fp8.CudaFp8(), stored(generator, static=static)
    for dtype in (*FLOATS, torch.float64):
        for shape in ((), (1,), (2, 16), (2, 0)):
            x = torch.randn(*shape, K, generator=generator).to(dtype)
            for each in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
                bias = torch.randn(N, generator=generator)
                y = row.linear(each, grid, bias, False)
                assert y.dtype == dtype and torch.equal(y, fp8.linear(x, *operands(grid), bias))
        x = torch.randn(2, 17, K, generator=generator).to(dtype)
        wanted = fp8.scaled_linear if dtype.itemsize == 2 else fp8.linear
        assert torch.equal(row.linear(x, grid, None, False), wanted(x, *operands(grid), None))


def test_few_and_many_tokens_take_their_own_ways(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    called: list[str] = []

    def watched(op: Any, x: Tensor, *rest: Any) -> Tensor:
        called.append("few")
        y: Tensor = op.default(x, *rest)
        return y

    scaled = fp8.torch._scaled_mm

    def product(*arguments: Any, **more: Any) -> Tensor:
        called.append("many")
        return scaled(*arguments, **more)

    monkeypatch.setattr(cuda_fp8, "call", watched)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    grid = stored(generator)
    for tokens, way in ((1, ["few"]), (32, ["few"]), (33, ["many"])):
        called.clear()
        x = torch.randn(tokens, K, generator=generator).bfloat16()
        cuda_fp8.CudaFp8().linear(x, grid, None, False)
        assert called == way


def test_experts(generator: torch.Generator) -> None:
    experts = [stored(generator) for _ in range(3)]
    stack = replace(
        experts[0],
        qweight=torch.stack([one.qweight for one in experts]),
        scales=torch.stack([one.scales for one in experts]),
    )
    x = torch.randn(5, K, generator=generator)
    y = cuda_fp8.CudaFp8().experts(x, torch.tensor([3, 0, 2]), stack, None, False)
    parts = ((x[:3], experts[0]), (x[3:], experts[2]))
    assert torch.equal(y, torch.cat([fp8.linear(p, *operands(e), None) for p, e in parts]))


def test_reasons_to_refuse(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    row, library = cuda_fp8.CudaFp8(), cuda_fp8.CudaFp8Library()
    problem = replace(Problem.of(stored(generator)), device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))

    def without() -> native.NativeStatus:
        return native.NativeStatus(cpu=True, cuda=False, cuda_reason="no nvcc")

    monkeypatch.setattr(native, "load", without)
    assert row.reject(problem) == "native CUDA kernels are not loaded: no nvcc"
    assert library.reject(problem) is None
    monkeypatch.setattr(native, "load", lambda: native.NativeStatus(cpu=True, cuda=True))
    assert row.reject(problem) is None
    wide = replace(problem, in_features=(1 << 26) + 16)
    assert row.reject(wide) == "takes up to 67108864 columns, not 67108880"
    assert library.reject(wide) is None
    names = [each.name for each in dispatch.rows(Fp8Grid)]
    assert names == ["cuda_fp8", "cuda_fp8_library", "cuda_fp8_weights", "dequantize_fp8"]


# ---- on a GPU

# The kernels take any number of rows; the row of the table does not, for `torch._scaled_mm`.
MODELS = (
    (1, 16),
    (33, 144),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (160, 28672),
)


@pytest.fixture
def there(cuda: torch.device) -> Callable[[Fp8Grid], Fp8Grid]:
    """Moves a grid to the GPU."""

    def move(grid: Fp8Grid) -> Fp8Grid:
        moved = replace(
            grid,
            qweight=grid.qweight.to(cuda),
            scales=grid.scales.to(cuda),
            values=grid.values.to(cuda),
            input_scale=None if grid.input_scale is None else grid.input_scale.to(cuda),
        )
        reason = cuda_fp8.CudaFp8().reject(replace(Problem.of(moved), out_features=16))
        if reason is not None:
            pytest.skip(reason)
        return moved

    return move


@pytest.mark.gpu
@pytest.mark.parametrize("shape", MODELS, ids=str)
@pytest.mark.parametrize("static", [None, 0.02])
def test_gpu_products(
    there: Callable[[Fp8Grid], Fp8Grid],
    generator: torch.Generator,
    shape: tuple[int, int],
    static: float | None,
) -> None:
    grid = there(stored(generator, *shape, static=static))
    device = grid.qweight.device
    for dtype in FLOATS:
        for tokens in (0, 1, 2, 4, 5, 8, 13, 32, 33):
            x = torch.randn(tokens, shape[1], generator=generator)
            x[1:2] = 0
            x[2:3, ::5] *= 100
            x[3:4, -1] = torch.nan
            bias = torch.randn(shape[0], generator=generator) if tokens % 2 else None
            x, bias = x.to(device, dtype), None if bias is None else bias.to(device, dtype)
            y = torch.ops.hfq.cuda_fp8_linear(x, *operands(grid), bias)
            check(y, x, grid, bias)
            assert torch.equal(
                y.nan_to_num(), torch.ops.hfq.cuda_fp8_linear(x, *operands(grid), bias).nan_to_num()
            )


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [16, 4096, 14336, 16384, 28672, 131072])
def test_gpu_tokens_are_those_of_the_cpu(
    there: Callable[[Fp8Grid], Fp8Grid], generator: torch.Generator, columns: int
) -> None:
    device = there(stored(generator)).qweight.device
    for dtype in FLOATS:
        x = torch.randn(6, columns, generator=generator) * 10 ** torch.linspace(-6, 4, 6)[:, None]
        x[4, :8] = torch.tensor([0.0, -0.0, 1e-9, -1e-9, torch.nan, -torch.nan, 1e30, -1e30])
        x[5, -1] = torch.inf
        x = x.to(dtype)
        for static in (None, torch.tensor([0.02]), torch.tensor([0.0])):
            wanted = quantize_tokens(x, static, E4M3)
            on_gpu = None if static is None else static.to(device)
            codes, scales = torch.ops.hfq.cuda_fp8_quantize_tokens(x.to(device), on_gpu)
            assert torch.equal(codes.view(torch.uint8).cpu(), wanted[0].view(torch.uint8))
            torch.testing.assert_close(scales.cpu(), wanted[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_gpu_many_tokens(there: Callable[[Fp8Grid], Fp8Grid], generator: torch.Generator) -> None:
    grid = there(stored(generator, 1024, 4096))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(100, 4096, generator=generator).to(grid.qweight.device, dtype)
        y = cuda_fp8.CudaFp8().linear(x, grid, None, False).double()
        few = torch.cat(
            [cuda_fp8.CudaFp8().linear(x[i : i + 25], grid, None, False) for i in range(0, 100, 25)]
        ).double()
        torch.testing.assert_close(y, few, rtol=0, atol=few.abs().max().item() * 2**-8)


@pytest.mark.gpu
def test_gpu_graph(
    there: Callable[[Fp8Grid], Fp8Grid], cuda: torch.device, generator: torch.Generator
) -> None:
    grid, row = there(stored(generator, 1024, 4096)), cuda_fp8.CudaFp8()
    for tokens in (1, 8, 64):
        x = torch.randn(tokens, 4096, generator=generator).to(cuda, torch.bfloat16)
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            row.linear(x, grid, None, False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = row.linear(x, grid, None, False)
        for _ in range(2):
            x.copy_(torch.randn(tokens, 4096, generator=generator))
            graph.replay()
            # The matrix library may choose another algorithm in a graph.
            close = 0 if tokens <= cuda_fp8.MAX_DIRECT_TOKENS else y.abs().max().item() * 2**-7
            torch.testing.assert_close(y, row.linear(x, grid, None, False), rtol=0, atol=close)


@pytest.mark.gpu
def test_gpu_opcheck(
    there: Callable[[Fp8Grid], Fp8Grid], cuda: torch.device, generator: torch.Generator
) -> None:
    check_op, hfq, grid = torch.library.opcheck, torch.ops.hfq, there(stored(generator))
    for tokens in (0, 3, 40):
        x = torch.randn(tokens, K, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
        bias = torch.randn(N, generator=generator).to(cuda).requires_grad_()
        check_op(hfq.cuda_fp8_linear.default, (x, *operands(grid), bias))
        check_op(hfq.cuda_fp8_quantize_tokens.default, (x.detach(), None))


@pytest.mark.gpu
def test_gpu_modules(
    there: Callable[[Fp8Grid], Fp8Grid], cuda: torch.device, generator: torch.Generator
) -> None:
    """Few and many tokens, gradients, and the way to the CPU and back."""
    there(stored(generator))
    linear = nn.Linear(K, 80, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    packed = QuantLinear.from_linear(linear, format="fp8", spec=Fp8Spec(activation="dynamic"))
    saved = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    xs = [torch.randn(tokens, K, generator=generator).bfloat16() for tokens in (1, 8, 40)]
    on_cpu = [packed(x) for x in xs]
    packed.to(cuda)
    assert packed.kernel_choice("weight").row.name == "cuda_fp8"
    weight = packed.dequantize().double()
    for x, wanted in zip(xs, on_cpu, strict=True):
        there_x = x.to(cuda).requires_grad_()
        y = packed(there_x)
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-2, atol=1e-2)
        grad = torch.randn(y.shape, generator=generator).to(cuda, torch.bfloat16)
        y.backward(grad)
        assert there_x.grad is not None
        torch.testing.assert_close(
            there_x.grad.double(), grad.double() @ weight, rtol=1e-2, atol=2e-2
        )
    packed.to("cpu")
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)), name
