"""W8A8 on CUDA: layout signed, operators, kernel row, on the CPU; the same on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hfq.core.activations import quantize_tokens
from hfq.core.spec import Int8Spec
from hfq.core.weight import PackedGrid
from hfq.kernels import cuda_int8, cuda_int8_ops, dispatch, native
from hfq.kernels.int8 import MAX_COLUMNS, _cuda_product, int8_linear
from hfq.kernels.row import Problem
from hfq.nn.linear import QuantLinear

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
N, K = 40, 144


def stored(
    generator: torch.Generator, rows: int = N, columns: int = K, static: float | None = None
) -> PackedGrid:
    """A random weight in the neutral layout."""
    codes = torch.randint(0, 256, (rows, columns, 1), dtype=torch.uint8, generator=generator)
    return PackedGrid(
        qweight=codes,
        scales=torch.randn(rows, 1, generator=generator) * 0.01,
        zeros=None,
        codebook=None,
        g_idx=None,
        bits=8,
        group_size=columns,
        in_features=columns,
        out_features=rows,
        activation="dynamic" if static is None else "static",
        input_scale=None if static is None else torch.tensor([static]),
    )


def prepared(grid: PackedGrid) -> PackedGrid:
    row = cuda_int8.CudaInt8()
    return replace(
        grid,
        qweight=row.prepare(grid.qweight, grid.bits),
        scales=row.prepare(grid.scales, grid.bits),
    )


def expected(x: Tensor, grid: PackedGrid, bias: Tensor | None = None) -> Tensor:
    return int8_linear(x, grid.qweight, grid.scales, grid.input_scale, bias, grid.in_features)


def arguments(grid: PackedGrid, bias: Tensor | None = None) -> tuple[object, ...]:
    operands = (grid.qweight, grid.scales, grid.input_scale, bias)
    return (*operands, grid.in_features, grid.out_features)


def dense(grid: PackedGrid, dtype: torch.dtype = torch.float32) -> Tensor:
    return dispatch.rows()[-1].dequantize(grid, dtype)


# ---- layout


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_round_trip(generator: torch.Generator, lead: tuple[int, ...]) -> None:
    row, shape = cuda_int8.CudaInt8(), (*lead, 5, 48, 1)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    before = codes.clone()
    pieces = row.prepare(codes, 8)
    assert pieces.shape == (*lead, 5, 3, 16, 1) and pieces.is_contiguous()
    assert torch.equal(pieces.view(torch.int8).view(shape).int(), codes.int() - 128)
    assert torch.equal(row.restore(pieces, shape, 8), codes)
    assert torch.equal(codes, before), "others may hold the stored tensor"
    scales = torch.randn(*lead, 5, 1, generator=generator)
    assert row.prepare(scales, 8) is scales


# ---- operators


@pytest.mark.parametrize("sums", [1, 1 << 20])
@pytest.mark.parametrize("static", [None, 0.02])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products(
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
    dtype: torch.dtype,
    static: float | None,
    sums: int,
) -> None:
    monkeypatch.setattr(cuda_int8_ops, "_SUMS", sums)
    grid = stored(generator, static=static)
    for tokens in (0, 1, 5, 40):
        x = torch.randn(tokens, K, generator=generator).to(dtype)
        for bias in (None, torch.randn(N, generator=generator).to(dtype)):
            for name in ("cuda_int8_linear", "cuda_int8_linear_cublas"):
                y = getattr(torch.ops.hfq, name)(x, *arguments(prepared(grid), bias))
                assert y.dtype == dtype and torch.equal(y, expected(x, grid, bias))


def test_gradients(generator: torch.Generator) -> None:
    grid = stored(generator)
    for name in ("cuda_int8_linear", "cuda_int8_linear_cublas"):
        x = torch.randn(5, K, generator=generator, requires_grad=True)
        bias = torch.randn(N, generator=generator, requires_grad=True)
        grad = torch.randn(5, N, generator=generator)
        getattr(torch.ops.hfq, name)(x, *arguments(prepared(grid), bias)).backward(grad)
        torch.testing.assert_close(x.grad, grad @ dense(grid))
        torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("tokens", [0, 3, 40])
def test_opcheck(generator: torch.Generator, tokens: int) -> None:
    check, hfq = torch.library.opcheck, torch.ops.hfq
    for grid in (prepared(stored(generator)), prepared(stored(generator, static=0.02))):
        x = torch.randn(tokens, K, generator=generator, requires_grad=True)
        bias = torch.randn(N, generator=generator, requires_grad=True)
        check(hfq.cuda_int8_linear.default, (x, *arguments(grid, bias)))
        check(hfq.cuda_int8_linear_cublas.default, (x, *arguments(grid, bias)))
        check(hfq.cuda_quantize_tokens.default, (x.detach(), grid.input_scale))
        sums, scales = torch.zeros(tokens, N, dtype=torch.int32), torch.ones(tokens, 1)
        out = torch.zeros(tokens, N)
        check(hfq.cuda_scale_sums.default, (out, sums, scales, grid.scales, None))


def test_every_operator_has_a_schema_and_a_line_in_the_docstring() -> None:
    assert cuda_int8_ops.__doc__ is not None
    for name in ("quantize_tokens", "scale_sums", "int8_linear", "int8_linear_cublas"):
        schema = getattr(torch.ops.hfq, f"cuda_{name}").default._schema
        assert str(schema).startswith(f"hfq::cuda_{name}(")
        assert f"    cuda_{name} " in cuda_int8_ops.__doc__


def test_what_fits_the_matrix_library_is_not_copied(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """The weight is read once for a product, not three times."""
    a, b = (
        torch.randint(-128, 128, (rows, 64), generator=generator, dtype=torch.int8)
        for rows in (17, 24)
    )
    seen = []
    product = torch._int_mm

    def watched(a: Tensor, b: Tensor) -> Tensor:
        seen.extend([a.data_ptr(), b.data_ptr()])
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", watched)
    assert torch.equal(_cuda_product(a, b).long(), a.long() @ b.long().T)
    assert seen == [a.data_ptr(), b.data_ptr()]


# ---- the kernel row


@pytest.mark.parametrize("static", [None, 0.02])
def test_row(generator: torch.Generator, static: float | None) -> None:
    row, grid = cuda_int8.CudaInt8(), stored(generator, static=static)
    ready = prepared(grid)
    assert torch.equal(row.dequantize(ready, torch.float64), dense(grid, torch.float64))
    index = torch.randint(N, (5,), generator=generator)
    assert torch.equal(row.lookup(ready, index, torch.bfloat16), dense(grid, torch.bfloat16)[index])
    for dtype in (*FLOATS, torch.float64):
        for shape in ((), (1,), (2, 16), (2, 17), (2, 0)):
            x = torch.randn(*shape, K, generator=generator).to(dtype)
            for each in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
                y = row.linear(each, ready, None, False)
                wanted = expected(x.float() if dtype == torch.float64 else x, grid).to(dtype)
                assert y.dtype == dtype and torch.equal(y, wanted)


def test_experts(generator: torch.Generator) -> None:
    experts = [stored(generator) for _ in range(3)]
    stack = replace(
        experts[0],
        qweight=torch.stack([one.qweight for one in experts]),
        scales=torch.stack([one.scales for one in experts]),
    )
    x = torch.randn(5, K, generator=generator)
    y = cuda_int8.CudaInt8().experts(x, torch.tensor([3, 0, 2]), prepared(stack), None, False)
    assert torch.equal(y, torch.cat([expected(x[:3], experts[0]), expected(x[3:], experts[2])]))


def test_stack(generator: torch.Generator) -> None:
    row = cuda_int8.CudaInt8()
    grids = [stored(generator, rows=rows) for rows in (33, 16)]
    stacked = row.stack([prepared(grid) for grid in grids])
    assert stacked is not None
    whole, parts = stacked
    x = torch.randn(3, K, generator=generator)
    y = row.linear(x, whole, None, False)
    assert torch.equal(y, torch.cat([expected(x, grid) for grid in grids], dim=-1))
    assert all(
        torch.equal(row.linear(x, p, None, False), expected(x, g))
        for p, g in zip(parts, grids, strict=True)
    )
    assert parts[0].qweight.data_ptr() == whole.qweight.data_ptr()
    static = [prepared(stored(generator, static=scale)) for scale in (0.02, 0.03)]
    assert row.stack(static) is None


def test_reasons_to_refuse(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    row, problem = cuda_int8.CudaInt8(), Problem.of(stored(generator))
    assert row.reject(problem) == "runs on cuda, the weight is on cpu"
    problem = replace(problem, device="cuda")
    for changes, words in (
        ({"activation": None}, "this weight does not ask for them"),
        ({"in_features": 136}, "multiples of 16 up to 131072, not 136"),
        ({"in_features": 0}, "not 0"),
        ({"in_features": MAX_COLUMNS + 16}, "not 131088"),
    ):
        reason = row.reject(replace(problem, **changes))  # type: ignore[arg-type]
        assert reason is not None and words in reason, changes

    def without() -> native.NativeStatus:
        return native.NativeStatus(cpu=True, cuda=False, cuda_reason="no nvcc")

    monkeypatch.setattr(native, "load", without)
    assert row.reject(problem) == "native CUDA kernels are not loaded: no nvcc"
    monkeypatch.setattr(native, "load", lambda: native.NativeStatus(cpu=True, cuda=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert row.reject(problem) is None
    assert row.reject(replace(problem, in_features=MAX_COLUMNS)) is None
    # Names alone say where a kernel stands.
    names = [each.name for each in dispatch.rows()]
    assert names.index("cuda_int8") < names.index("dequantize")


# ---- on a GPU

MODELS = (
    (1, 16),
    (33, 144),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (151, 28672),
)


@pytest.fixture
def there(cuda: torch.device) -> Callable[[PackedGrid], PackedGrid]:
    """Moves a grid to the GPU."""
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")

    def move(grid: PackedGrid) -> PackedGrid:
        static = None if grid.input_scale is None else grid.input_scale.to(cuda)
        moved = {"qweight": grid.qweight.to(cuda), "scales": grid.scales.to(cuda)}
        return replace(grid, **moved, input_scale=static)  # type: ignore[arg-type]

    return move


@pytest.mark.gpu
@pytest.mark.parametrize("shape", MODELS, ids=str)
@pytest.mark.parametrize("static", [None, 0.02])
def test_gpu_products_are_the_reference_to_the_bit(
    there: Callable[[PackedGrid], PackedGrid],
    generator: torch.Generator,
    shape: tuple[int, int],
    static: float | None,
) -> None:
    grid = there(stored(generator, *shape, static=static))
    ready, device = prepared(grid), grid.qweight.device
    for dtype in FLOATS:
        for tokens in (0, 1, 2, 4, 5, 8, 13, 32, 33, 100):
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            x[1:2] = 0
            x[3:4, -1] = torch.nan
            bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
            x, bias = x.to(device), None if bias is None else bias.to(device)
            wanted = expected(x, grid, bias)
            for name in ("cuda_int8_linear", "cuda_int8_linear_cublas"):
                y = getattr(torch.ops.hfq, name)(x, *arguments(ready, bias))
                torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [16, 4096, 14336, 16384, 28672, 131072])
def test_gpu_tokens_are_those_of_the_cpu(
    there: Callable[[PackedGrid], PackedGrid],
    cuda: torch.device,
    generator: torch.Generator,
    columns: int,
) -> None:
    for dtype in FLOATS:
        x = torch.randn(6, columns, generator=generator) * 10 ** torch.linspace(-6, 4, 6)[:, None]
        x[5, -1] = torch.inf
        x = x.to(dtype)
        for static in (None, torch.tensor([0.02]), torch.tensor([0.0])):
            wanted = quantize_tokens(x, static)
            on_gpu = None if static is None else static.to(cuda)
            for quantize in (torch.ops.hfq.cuda_quantize_tokens, quantize_tokens):
                codes, scales = quantize(x.to(cuda), on_gpu)
                assert torch.equal(codes.cpu(), wanted[0])
                torch.testing.assert_close(scales.cpu(), wanted[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_gpu_graph(
    there: Callable[[PackedGrid], PackedGrid], cuda: torch.device, generator: torch.Generator
) -> None:
    grid = there(stored(generator, 1024, 4096))
    row, ready = cuda_int8.CudaInt8(), prepared(grid)
    for tokens in (1, 8, 64):
        x = torch.randn(tokens, 4096, generator=generator).to(cuda, torch.bfloat16)
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            row.linear(x, ready, None, False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = row.linear(x, ready, None, False)
        for _ in range(2):
            x.copy_(torch.randn(tokens, 4096, generator=generator))
            graph.replay()
            assert torch.equal(y, expected(x, grid))


@pytest.mark.gpu
def test_gpu_opcheck(
    there: Callable[[PackedGrid], PackedGrid], cuda: torch.device, generator: torch.Generator
) -> None:
    check, hfq, grid = torch.library.opcheck, torch.ops.hfq, prepared(there(stored(generator)))
    for tokens in (0, 3, 40):
        x = torch.randn(tokens, K, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
        bias = torch.randn(N, generator=generator).to(cuda).requires_grad_()
        check(hfq.cuda_int8_linear.default, (x, *arguments(grid, bias)))
        check(hfq.cuda_int8_linear_cublas.default, (x, *arguments(grid, bias)))
        check(hfq.cuda_quantize_tokens.default, (x.detach(), None))


@pytest.mark.gpu
def test_gpu_modules(
    there: Callable[[PackedGrid], PackedGrid], cuda: torch.device, generator: torch.Generator
) -> None:
    """Few and many tokens, gradients, and the way to the CPU and back."""
    linear = nn.Linear(K, 72, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    packed = QuantLinear.from_linear(linear, format="int8", spec=Int8Spec(activation="dynamic"))
    saved = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    xs = [torch.randn(tokens, K, generator=generator).bfloat16() for tokens in (1, 8, 40)]
    on_cpu = [packed(x) for x in xs]
    packed.to(cuda)
    assert packed.kernel_choice("weight").row.name == "cuda_int8"
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
        assert torch.equal(tensor, saved[name]), name
