"""Activations of 8 bits on CUDA, int8 and E4M3: layout, operators and kernel rows, on the CPU: what a GPU computes is in test_cuda_w8a8.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from w8a8_weights import (
    FLOATS,
    FP8,
    INT8,
    ROWS,
    WIDENED,
    K,
    Kind,
    N,
    check_schemas,
    check_sums_schema,
    dense,
    prepared,
    problem_of,
)

from hfq.core.weight import Fp8Grid
from hfq.kernels import cuda_fp8, cuda_int8_ops, dense_products, dispatch, fp8
from hfq.kernels.int8 import MAX_COLUMNS, _cuda_product
from hfq.kernels.row import Problem


@pytest.fixture(params=ROWS, ids=str)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


# ---- layout signed


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_round_trip(generator: torch.Generator, lead: tuple[int, ...]) -> None:
    row, shape = INT8.row, (*lead, 5, 48, 1)
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
    grid = INT8.stored(generator, static=static)
    for tokens in (0, 1, 5, 40):
        x = torch.randn(tokens, K, generator=generator).to(dtype)
        for bias in (None, torch.randn(N, generator=generator).to(dtype)):
            for product in INT8.products:
                y = product(x, *INT8.arguments(prepared(INT8, grid), bias))
                assert y.dtype == dtype and torch.equal(y, INT8.expected(x, grid, bias))


@pytest.mark.parametrize("rows_at_a_time", [N, 10])
def test_gradients(
    kind: Kind, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int
) -> None:
    monkeypatch.setattr(dense_products, "CHUNK", 4 * K * rows_at_a_time)
    grid = kind.stored(generator)
    for product in kind.products:
        x = torch.randn(5, K, generator=generator, requires_grad=True)
        bias = torch.randn(N, generator=generator, requires_grad=True)
        grad = torch.randn(5, N, generator=generator)
        product(x, *kind.arguments(prepared(kind, grid), bias)).backward(grad)
        torch.testing.assert_close(x.grad, grad @ dense(grid))
        torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("tokens", [0, 3, 40])
def test_opcheck(kind: Kind, generator: torch.Generator, tokens: int) -> None:
    for static in (None, 0.02):
        ready = prepared(kind, kind.stored(generator, static=static))
        x = torch.randn(tokens, K, generator=generator, requires_grad=True)
        check_schemas(kind, ready, x)
    if kind is INT8:
        check_sums_schema(tokens, ready.scales)


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


# ---- the kernel rows


@pytest.mark.parametrize("static", [None, 0.02])
def test_row(kind: Kind, generator: torch.Generator, static: float | None) -> None:
    row, grid = kind.row, kind.stored(generator, static=static)
    ready = prepared(kind, grid)
    assert torch.equal(row.dequantize(ready, torch.float64), dense(grid, torch.float64))
    index = torch.randint(N, (5,), generator=generator)
    assert torch.equal(row.lookup(ready, index, torch.bfloat16), dense(grid, torch.bfloat16)[index])
    for dtype in (*FLOATS, torch.float64):
        for shape in ((), (1,), (2, 16), (2, 17), (2, 65), (2, 0)):
            x = torch.randn(*shape, K, generator=generator).to(dtype)
            for bias in (None, torch.randn(N, generator=generator)):
                wanted = kind.expected_of_row(x, grid, bias)
                for each in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
                    y = row.linear(each, ready, bias, False)
                    assert y.dtype == dtype and torch.equal(y, wanted)


def test_few_and_many_tokens_take_their_own_ways(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    called: list[str] = []

    def watched(op: Any, x: Tensor, *rest: Any) -> Tensor:
        called.append("few")
        y: Tensor = op.default(x, *rest)
        return y

    scaled = torch._scaled_mm

    def product(*arguments: Any, **more: Any) -> Tensor:
        called.append("many")
        return scaled(*arguments, **more)

    monkeypatch.setattr(cuda_fp8, "call", watched)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    grid = FP8.stored(generator)
    for tokens, way in ((1, ["few"]), (32, ["few"]), (33, ["many"])):
        called.clear()
        x = torch.randn(tokens, K, generator=generator).bfloat16()
        FP8.row.linear(x, grid, None, False)
        assert called == way


def test_experts(kind: Kind, generator: torch.Generator) -> None:
    experts = [kind.stored(generator) for _ in range(3)]
    stack = replace(
        experts[0],
        qweight=torch.stack([one.qweight for one in experts]),
        scales=torch.stack([one.scales for one in experts]),
    )
    x = torch.randn(5, K, generator=generator)
    y = kind.row.experts(x, torch.tensor([3, 0, 2]), prepared(kind, stack), None, False)
    parts = [kind.expected(x[:3], experts[0]), kind.expected(x[3:], experts[2])]
    assert torch.equal(y, torch.cat(parts))


def test_stack(kind: Kind, generator: torch.Generator) -> None:
    row = kind.row
    # The matrix library takes rows of E4M3 in multiples of 16.
    grids = [kind.stored(generator, rows=rows) for rows in (48 if kind is FP8 else 33, 16)]
    stacked = row.stack([prepared(kind, grid) for grid in grids])
    assert stacked is not None
    whole, parts = stacked
    x = torch.randn(3, K, generator=generator)
    each = [kind.expected(x, grid) for grid in grids]
    # Close: matrix libraries add floats in an order that depends on the shape.
    torch.testing.assert_close(row.linear(x, whole, None, False), torch.cat(each, dim=-1))
    for part, wanted in zip(parts, each, strict=True):
        assert torch.equal(row.linear(x, part, None, False), wanted)
    assert parts[0].qweight.data_ptr() == whole.qweight.data_ptr()
    static = [prepared(kind, kind.stored(generator, static=scale)) for scale in (0.02, 0.03)]
    assert row.stack(static) is None


def test_int8_reasons_to_refuse(machine: Callable[..., None], generator: torch.Generator) -> None:
    row, problem = INT8.row, Problem.of(INT8.stored(generator))
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
    machine((8, 0), kernels=False)
    assert row.reject(problem) == "native CUDA kernels are not loaded: no nvcc"
    machine((8, 0))
    assert row.reject(problem) is None
    assert row.reject(replace(problem, in_features=MAX_COLUMNS)) is None
    # Names alone say where a kernel stands.
    names = [each.name for each in dispatch.rows()]
    assert names.index("cuda_int8") < names.index("dequantize")


def test_fp8_reasons_to_refuse(machine: Callable[..., None], generator: torch.Generator) -> None:
    """What both rows refuse is in test_fp8.py."""
    row, library = FP8.row, cuda_fp8.CudaFp8Library()
    problem = replace(Problem.of(FP8.stored(generator)), device="cuda")
    machine((8, 9), kernels=False)
    assert row.reject(problem) == "native CUDA kernels are not loaded: no nvcc"
    assert library.reject(problem) is None
    machine((8, 9))
    assert row.reject(problem) is None
    wide = replace(problem, in_features=(1 << 26) + 16)
    assert row.reject(wide) == "takes up to 67108864 columns, not 67108880"
    assert library.reject(wide) is None
    names = [each.name for each in dispatch.rows(Fp8Grid)]
    assert names == [
        "cpu_fp8",
        "cuda_fp8",
        "cuda_fp8_library",
        "cuda_fp8_widened",
        "cuda_fp8_weights",
        "dequantize_fp8",
    ]


# ---- E4M3 where the matrix library has no product of it


def test_many_widened_tokens_go_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    parts: list[int] = []
    product = fp8._float32_product

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        assert x.dtype == weight.dtype == torch.bfloat16
        parts.append(len(weight))
        return product(x, weight)

    monkeypatch.setattr(fp8, "_float32_product", watched)
    monkeypatch.setattr(fp8, "_WIDENED", 32 * K)
    grid = WIDENED.stored(generator, rows=85)
    bias = torch.randn(85, generator=generator)
    for dtype in FLOATS:
        for tokens, expected in ((128, []), (129, [32, 32, 21]), (3 * K, [16] * 5 + [5])):
            x = (torch.randn(tokens, K, generator=generator) * 3).to(dtype)
            x[5, 5] = torch.nan
            parts.clear()
            y = WIDENED.row.linear(x, grid, bias, False)
            assert parts == expected
            WIDENED.check(y, x, grid, bias, roundings=K)


@pytest.mark.parametrize("static", [None, 0.004])
@pytest.mark.parametrize("shape", [(1, 1), (33, 140), (16, 8), (5, 17), (48, 144)], ids=str)
def test_any_shape_is_widened(
    generator: torch.Generator, shape: tuple[int, int], static: float | None
) -> None:
    row, (rows, columns) = WIDENED.row, shape
    grid = WIDENED.stored(generator, rows, columns, static=static)
    ready, weight = prepared(WIDENED, grid), dense(grid)
    as_stored = columns % 16 == 0
    assert (ready.qweight.data_ptr() == grid.qweight.data_ptr()) == as_stored
    assert (ready.qweight.dim() == grid.qweight.dim()) == as_stored
    if not as_stored:
        restored = row.restore(ready.qweight, tuple(grid.qweight.shape), 8)
        assert torch.equal(restored, grid.qweight) and restored.is_contiguous()
    assert torch.equal(row.dequantize(ready, torch.float32), weight)
    index = torch.randint(rows, (5,), generator=generator)
    assert torch.equal(row.lookup(ready, index, torch.float32), weight[index])
    whole, parts = (None, []) if static else row.stack([ready, ready])
    for tokens in (0, 1, 5, 129):
        bias = torch.randn(rows, generator=generator) if tokens % 2 else None
        for dtype in FLOATS:
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            y = row.linear(x, ready, bias, False)
            WIDENED.check(y, x, grid, bias, roundings=columns + 3)
            if whole is not None:
                both = row.linear(x, whole, None, False).split(rows, dim=-1)
                for one in (*both, *(row.linear(x, part, None, False) for part in parts)):
                    WIDENED.check(one, x, grid, None, roundings=columns + 3)
        x = torch.randn(tokens, columns, generator=generator, requires_grad=True)
        grad = torch.randn(tokens, rows, generator=generator)
        row.linear(x, ready, bias, False).backward(grad)
        torch.testing.assert_close(x.grad, grad @ weight)


def test_padded_rows_are_compiled(generator: torch.Generator) -> None:
    grid = WIDENED.stored(generator, 33, 140)
    ready = prepared(WIDENED, grid)

    def linear(x: Tensor) -> Tensor:
        return WIDENED.row.linear(x, ready, None, False)

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5, 129):
        x = torch.randn(tokens, 140, generator=generator)
        torch.testing.assert_close(compiled(x), linear(x))


def test_widened_experts_of_any_shape(generator: torch.Generator) -> None:
    for static in (None, 0.004):
        experts = [WIDENED.stored(generator, 33, 140, static=static) for _ in range(3)]
        stack = replace(
            experts[0],
            qweight=torch.stack([one.qweight for one in experts]),
            scales=torch.stack([one.scales for one in experts]),
            input_scale=None if static is None else torch.full((3, 1), static),
        )
        ready, x = prepared(WIDENED, stack), torch.randn(6, 140, generator=generator)
        assert WIDENED.row.reads_counts_on_device(x, 6, ready) == (static is None)
        y = WIDENED.row.experts(x, torch.tensor([3, 0, 3]), ready, None, False)
        for tokens, expert in ((slice(0, 3), 0), (slice(3, 6), 2)):
            WIDENED.check(y[tokens], x[tokens], experts[expert], None, roundings=143)


def test_widened_reasons_to_refuse(machine: Callable[..., None]) -> None:
    row, problem = WIDENED.row, problem_of(WIDENED, device="cuda")
    for changes, words in (
        ({"device": "cpu"}, "runs on cuda, the weight is on cpu"),
        ({"activation": None}, "takes fp8 activations, this weight does not ask for them"),
        ({"in_features": 0}, "takes up to 67108864 columns, not 0"),
        ({"in_features": (1 << 26) + 1}, "takes up to 67108864 columns, not 67108865"),
    ):
        assert row.reject(replace(problem, **changes)) == words  # type: ignore[arg-type]
    machine((8, 0), kernels=False)
    assert row.reject(problem) == "native CUDA kernels are not loaded: no nvcc"
    machine((7, 5))
    assert row.reject(problem) == "needs GPUs of compute capability 8.0 or later, found 7.5"
    for found in ((8, 0), (8, 6), (9, 0), (12, 0)):
        machine(found)
        assert row.reject(problem) is None
        assert row.reject(replace(problem, in_features=7, out_features=1)) is None


@pytest.mark.parametrize(
    ("found", "changes", "name"),
    [
        ((8, 0), {}, "cuda_fp8_widened"),
        ((8, 6), {"activation": "static"}, "cuda_fp8_widened"),
        ((12, 0), {}, "cuda_fp8_widened"),
        ((8, 9), {}, "cuda_fp8"),
        ((9, 0), {}, "cuda_fp8"),
        ((9, 0), {"out_features": 33}, "cuda_fp8_widened"),
        ((9, 0), {"in_features": 72}, "cuda_fp8_widened"),
        ((8, 0), {"activation": None}, "cuda_fp8_weights"),
        ((7, 5), {}, "dequantize_fp8"),
    ],
)
def test_every_gpu_has_its_row(
    machine: Callable[..., None], found: tuple[int, int], changes: dict[str, Any], name: str
) -> None:
    machine(found)
    # Not the function that keeps its choices: those are for the GPUs of this machine.
    choice = dispatch.select.__wrapped__(problem_of(FP8, device="cuda", **changes))
    assert choice.row.name == name
