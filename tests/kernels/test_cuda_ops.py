"""Layout fragments, the operators on it and their kernel row, on the CPU: what a GPU computes is in test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.spec import QuantSpec
from hfq.core.weight import PackedGrid
from hfq.formats import FORMATS
from hfq.kernels import cuda, cuda_ops, dispatch, fragments
from hfq.kernels.row import Problem

N, K = 40, 136

SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "2 bits, zeros": ("int", {"bits": 2, "group_size": 32, "sym": False}),
    "3 bits": ("int", {"bits": 3, "group_size": 64}),
    "4 bits, zeros, bfloat16 scales": (
        "int",
        {"bits": 4, "group_size": 32, "sym": False, "scale_dtype": "bfloat16"},
    ),
    "8 bits, one group": ("int8", {}),
    "nf4, double quantization": ("nf4", {"group_size": 64, "double_quant": True}),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def grid(request: pytest.FixtureRequest, random_weight: Callable[..., Tensor]) -> PackedGrid:
    """A weight `[N, K]` as it is stored."""
    format_name, settings = request.param
    return stored(random_weight(N, K), format_name, FORMATS.get(format_name).spec(settings))


def stored(weight: Tensor, format_name: str, spec: QuantSpec) -> PackedGrid:
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    packed_format = FORMATS.get(format_name)
    return packed_format.grid(packed_format.pack(quantized), spec, *weight.shape)


def prepared(grid: PackedGrid) -> PackedGrid:
    row = cuda.CudaFragments()
    return replace(
        grid,
        qweight=row.prepare(grid.qweight, grid.bits),
        scales=row.prepare(grid.scales, grid.bits),
        zeros=None if grid.zeros is None else row.prepare(grid.zeros, grid.bits),
    )


def arguments(grid: PackedGrid, *between: object) -> tuple[object, ...]:
    operands = (grid.qweight, grid.scales, grid.zeros, grid.codebook)
    return (*operands, *between, grid.bits, grid.group_size, grid.in_features, grid.out_features)


def dense(grid: PackedGrid, dtype: torch.dtype = torch.float32) -> Tensor:
    return dispatch.rows()[-1].dequantize(grid, dtype)


# ---- layout


@pytest.mark.parametrize("bits", fragments.BITS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 128), (17, 136), (33, 264)])
def test_round_trip(
    generator: torch.Generator, bits: int, lead: tuple[int, ...], rows: int, columns: int
) -> None:
    shape = (*lead, rows, columns * bits // 8, 1)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tiles = fragments.to_fragments(codes, bits)
    width = 128 if bits == 3 else 256 // bits
    blocks = -(-columns // width)
    assert tiles.shape == (*lead, -(-rows // 16), blocks, 48 if bits == 3 else 32, 16)
    assert tiles.is_contiguous()
    assert torch.equal(fragments.from_fragments(tiles, shape, bits), codes)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scales = torch.randn(*lead, rows, 5, generator=generator).to(dtype)
        pairs = fragments.to_fragments(scales, bits)
        assert pairs.shape == (*lead, -(-rows // 16), 5, 8, 2)
        assert pairs.is_contiguous()
        n = rows - 1
        assert torch.equal(pairs[..., n // 16, :, n % 8, n // 8 % 2], scales[..., n, :])
        assert torch.equal(fragments.from_fragments(pairs, scales.shape, bits), scales)


@pytest.mark.parametrize("bits", fragments.BITS)
def test_conversion_in_pieces(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, bits: int
) -> None:
    codes = torch.randint(0, 256, (100, 17 * bits, 1), generator=generator, dtype=torch.uint8)
    whole = fragments.to_fragments(codes, bits)
    monkeypatch.setattr(fragments, "_CHUNK", 32 * 136)
    assert torch.equal(fragments.to_fragments(codes, bits), whole)
    assert torch.equal(fragments.from_fragments(whole, codes.shape, bits), codes)


def test_8_bit_codes_are_an_operand_of_integer_products(generator: torch.Generator) -> None:
    """mma.m16n8k32: register 0 has row g, 1 row g + 8, of the first four columns of a lane, 2 and 3 of the others."""
    codes = torch.randint(0, 256, (16, 32, 1), generator=generator, dtype=torch.uint8)
    lanes = fragments.to_fragments(codes, 8)[0, 0].view(8, 4, 2, 2, 4)
    for (g, t), lane in zip(
        torch.cartesian_prod(torch.arange(8), torch.arange(4)), lanes.flatten(0, 1), strict=True
    ):
        for register, row in ((0, g), (1, g + 8)):
            columns = codes[row, 8 * t : 8 * t + 8, 0]
            assert torch.equal(lane[:, register].flatten(), columns)


# ---- operators


def test_dequantize_is_that_of_the_stored_weight(grid: PackedGrid) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.ops.hfq.cuda_dequantize(*arguments(prepared(grid)), dtype)
        assert torch.equal(weight, dense(grid, dtype))


@pytest.mark.parametrize("chunk", [1, 1 << 30])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
    grid: PackedGrid,
    with_bias: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr(cuda_ops, "CHUNK", chunk)
    ready, weight = prepared(grid), dense(grid)
    for shape in ((5,), (2, 3), (0,)):
        x = torch.randn(*shape, K, generator=generator, requires_grad=True)
        bias = torch.randn(N, generator=generator, requires_grad=True) if with_bias else None
        leaves = [x, *([] if bias is None else [bias])]
        grad = torch.randn(*shape, N, generator=generator)
        expected = torch.nn.functional.linear(x, weight, bias)
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for name in ("cuda_linear", "cuda_linear_dequantized"):
            y = getattr(torch.ops.hfq, name)(x, *arguments(ready, bias))
            torch.testing.assert_close(y, expected)
            for one, other in zip(
                torch.autograd.grad(y, leaves, grad), expected_grads, strict=True
            ):
                torch.testing.assert_close(one, other)


def test_gradients_of_gradients(generator: torch.Generator, grid: PackedGrid) -> None:
    ready = prepared(grid)
    grad = torch.randn(1, N, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda grad: torch.ops.hfq.cuda_linear_gradient(grad, *arguments(ready)), grad
    )


def test_opcheck(generator: torch.Generator, grid: PackedGrid) -> None:
    ready = prepared(grid)
    x = torch.randn(3, K, generator=generator, requires_grad=True)
    bias = torch.randn(N, generator=generator, requires_grad=True)
    check, hfq = torch.library.opcheck, torch.ops.hfq
    check(hfq.cuda_dequantize.default, (*arguments(ready), torch.bfloat16))
    index = torch.randint(N, (5,), generator=generator)
    check(hfq.cuda_lookup.default, (index, *arguments(ready), torch.float16))
    check(hfq.cuda_linear.default, (x, *arguments(ready, bias)))
    check(hfq.cuda_linear_dequantized.default, (x, *arguments(ready, None)))
    grad = torch.randn(3, N, generator=generator, requires_grad=True)
    check(hfq.cuda_linear_gradient.default, (grad, *arguments(ready)))


def test_every_operator_has_a_schema_and_a_line_in_the_docstring() -> None:
    assert cuda_ops.__doc__ is not None
    for name in (
        *("dequantize", "lookup", "linear", "linear_dequantized", "linear_gradient"),
        "experts_linear",
    ):
        schema = getattr(torch.ops.hfq, f"cuda_{name}").default._schema
        assert str(schema).startswith(f"hfq::cuda_{name}(")
        assert f"    cuda_{name} " in cuda_ops.__doc__


# ---- the kernel row


def test_row(generator: torch.Generator, grid: PackedGrid) -> None:
    row, ready = cuda.CudaFragments(), prepared(grid)
    assert torch.equal(row.dequantize(ready, torch.float64), dense(grid, torch.float64))
    index = torch.randint(N, (5,), generator=generator)
    assert torch.equal(row.lookup(ready, index, torch.bfloat16), dense(grid, torch.bfloat16)[index])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for shape in ((1,), (2, 20), (2, 0), ()):
            x = torch.randn(*shape, K, generator=generator).to(dtype)
            expected = torch.nn.functional.linear(x, dense(grid, dtype))
            y = row.linear(x, ready, None, False)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected)


def test_row_restores_what_it_prepared(grid: PackedGrid) -> None:
    row, ready = cuda.CudaFragments(), prepared(grid)
    for name in ("qweight", "scales", "zeros"):
        neutral, changed = getattr(grid, name), getattr(ready, name)
        if neutral is not None:
            assert changed.dim() != neutral.dim()
            assert torch.equal(row.restore(changed, tuple(neutral.shape), grid.bits), neutral)


def stacked(experts: list[PackedGrid]) -> PackedGrid:
    return replace(
        experts[0],
        qweight=torch.stack([one.qweight for one in experts]),
        scales=torch.stack([one.scales for one in experts]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts(
    generator: torch.Generator, random_weight: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    spec = FORMATS.get("int").spec({"group_size": 32})
    experts = [stored(random_weight(N, K), "int", spec) for _ in range(3)]
    row, stack = cuda.CudaFragments(), prepared(stacked(experts))
    x = torch.randn(5, K, generator=generator).to(dtype)
    bias = torch.randn(3, N, generator=generator).to(dtype)
    linear = torch.nn.functional.linear
    parts = [
        linear(x[:3], dense(experts[0], dtype), bias[0]),
        linear(x[3:], dense(experts[2], dtype), bias[2]),
    ]
    y = row.experts(x, torch.tensor([3, 0, 2]), stack, bias, False)
    assert y.dtype == dtype
    torch.testing.assert_close(y, torch.cat(parts))
    few = row.experts(x[:3], torch.tensor([3, 0, 0]), stack, bias, False)
    torch.testing.assert_close(few, parts[0])


def test_experts_whose_counts_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
    random_weight: Callable[..., Tensor],
) -> None:
    spec = FORMATS.get("int").spec({"group_size": 32})
    experts = [stored(random_weight(N, K), "int", spec) for _ in range(3)]
    row, stack = cuda.CudaFragments(), prepared(stacked(experts))
    x = torch.randn(5, K, generator=generator).half()
    for products, most in ((1, cuda.MAX_EXPERT_TOKENS), (300 * N * K, 300)):
        monkeypatch.setattr(cuda, "_EXPERT_PRODUCTS", products)
        assert row.reads_counts_on_device(x, 3 * most, stack)
        assert not row.reads_counts_on_device(x, 3 * most + 1, stack)
    assert not row.reads_counts_on_device(x.float(), 5, stack)
    learning = x.clone().requires_grad_()
    assert not row.reads_counts_on_device(learning, 5, stack)
    with torch.no_grad():
        assert row.reads_counts_on_device(learning, 5, stack)
    y = row.experts(x, torch.tensor([0, 2, 1]), stack, None, False)
    torch.testing.assert_close(y[:2], x[:2] @ dense(experts[1], torch.float16).T)
    assert not y[3:].any()
    check = torch.library.opcheck
    counts = torch.tensor([0, 2, 1])
    check(torch.ops.hfq.cuda_experts_linear.default, (x, counts, *arguments(stack, None)))


def test_stack(generator: torch.Generator, random_weight: Callable[..., Tensor]) -> None:
    spec = FORMATS.get("int").spec({"group_size": 32, "sym": False})
    grids = [stored(random_weight(rows, K), "int", spec) for rows in (32, 16)]
    row = cuda.CudaFragments()
    stacked = row.stack([prepared(grid) for grid in grids])
    assert stacked is not None
    whole, parts = stacked
    weights = [row.dequantize(part, torch.float32) for part in parts]
    assert torch.equal(row.dequantize(whole, torch.float32), torch.cat(weights))
    assert all(torch.equal(w, dense(grid)) for w, grid in zip(weights, grids, strict=True))
    assert parts[0].qweight.data_ptr() == whole.qweight.data_ptr()
    assert row.stack([prepared(stored(random_weight(N, K), "int", spec))] * 2) is None


def test_reasons_to_refuse(
    machine: Callable[..., None], random_weight: Callable[..., Tensor]
) -> None:
    row = cuda.CudaFragments()
    spec = FORMATS.get("int").spec({"group_size": 32})
    problem = Problem.of(stored(random_weight(N, K), "int", spec))
    assert row.reject(problem) == "runs on cuda, the weight is on cpu"
    problem = replace(problem, device="cuda")
    for changes, words in (
        ({"bits": 5}, "not 5"),
        ({"bits": 3, "has_codebook": True}, "codebooks of 4 bits"),
        ({"has_g_idx": True}, "g_idx"),
        ({"in_features": 100}, "multiples of 8"),
        ({"in_features": 1 << 20}, "below 1048576"),
        ({"group_size": 48}, "multiples of 32, not 48"),
        ({"activation": "dynamic"}, "int8 (dynamic)"),
    ):
        reason = row.reject(replace(problem, **changes))  # type: ignore[arg-type]
        assert reason is not None and words in reason, changes
    machine((8, 0), kernels=False)
    assert row.reject(problem) == "native CUDA kernels are not loaded: no nvcc"
    machine((9, 5), (7, 5))
    assert row.reject(problem) == "needs GPUs of compute capability 8.0 or later, found 7.5"
    machine((8, 0), (8, 0))
    assert row.reject(problem) is None
    assert row.reject(replace(problem, in_features=40, group_size=40)) is None
