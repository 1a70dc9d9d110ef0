"""Gradients of the native CPU products: exact where sums are, in memory that is used again, twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.core import bits as bit_packing
from hfq.core.float8 import e4m3_table
from hfq.kernels import dense_products, native, ops, rows16, scratch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("int2", "int3", "int4", "int4_zeros", "table4", "int8", "float8")
# E4M3 of 0, 1, 2, 3, 5, -1, -3, -4.
FLOAT8 = (0x00, 0x38, 0x40, 0x44, 0x4A, 0xB8, 0xC4, 0xC8)
# (N, K, group_size): blocks that are not full, last groups that are shorter.
SHAPES = ((24, 64, 32), (17, 130, 64), (50, 100, 96))


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    status = native.load()
    if not status.cpu:
        pytest.skip(f"no native CPU kernels: {status.cpu_reason}")
    scratch._LOCAL.__dict__.clear()
    yield
    scratch._LOCAL.__dict__.clear()


class Weight:
    """Small integers times powers of two: products with integers are rounded at the end only."""

    def __init__(
        self, rows: int, columns: int, group_size: int, generator: torch.Generator, kind: str
    ) -> None:
        bits = int(kind.removesuffix("_zeros")[-1])
        if kind == "float8":
            group_size = columns
        groups = -(-columns // group_size)
        codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
        scales = 2.0 ** -torch.randint(4, (rows, groups), generator=generator)
        offset = torch.full((rows, groups), float(1 << (bits - 1)))
        zeros = codebook = None
        if kind.endswith("zeros"):
            offset = torch.randint(1 << bits, (rows, groups), generator=generator).float()
            zeros = rows16.to_rows16(offset)
        by_column = torch.arange(columns) // group_size
        values = codes.double() - offset.double()[:, by_column]
        if kind == "table4":
            codebook = torch.randint(-100, 100, (16,), generator=generator).float()
            values = codebook.double()[codes.long()]
        if kind == "float8":
            codebook = e4m3_table()
            codes = torch.tensor(FLOAT8, dtype=torch.uint8)[codes.long() % len(FLOAT8)]
            values = codebook.double()[codes.long()]
        packed = bit_packing.pack(codes, bits).unsqueeze(-1)
        lines = rows16.to_rows16(packed, split=bits == 3)
        self.operands = (lines, rows16.to_rows16(scales), zeros, codebook)
        self.sizes = (bits, group_size, columns, rows)
        self.dense = values * scales.double()[:, by_column]

    def gradient(self, grad: Tensor) -> Tensor:
        found: Tensor = torch.ops.hfq.cpu_linear_gradient(grad, *self.operands, *self.sizes)
        return found


def integers(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(
    isa: str, shape: tuple[int, int, int], kind: str, generator: torch.Generator
) -> None:
    weight = Weight(*shape, generator, kind)
    for dtype in (*FLOATS, torch.float64):
        for lead in ((1,), (3,), (70,), (2, 5), (0,)):
            grad = integers(*lead, shape[0], generator=generator, dtype=dtype)
            found = weight.gradient(grad)
            assert found.dtype == dtype
            assert torch.equal(found, (grad.double() @ weight.dense).to(dtype)), (dtype, lead)


@pytest.mark.parametrize("name", ["cpu_linear", "cpu_linear_dequantized"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = Weight(50, 128, 64, generator, "int4")
    more = (False,) if name == "cpu_linear" else ()
    x = torch.randn(5, 128, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(50, generator=generator, requires_grad=True)
    y = getattr(torch.ops.hfq, name)(x, *weight.operands, bias, *weight.sizes, *more)
    grad = integers(5, 50, generator=generator, dtype=dtype)
    y.backward(grad)
    assert x.grad is not None and bias.grad is not None
    assert torch.equal(x.grad, (grad.double() @ weight.dense).to(dtype))
    assert torch.equal(bias.grad, grad.sum(0).float())


def test_int8_activations_have_the_same_gradient(generator: torch.Generator) -> None:
    weight = Weight(50, 64, 64, generator, "int8")
    x = torch.randn(5, 64, generator=generator).bfloat16().requires_grad_()
    codes, scales, _, _ = weight.operands
    y = torch.ops.hfq.cpu_int8_linear(x, codes, scales, None, None, 64, 50)
    grad = integers(5, 50, generator=generator, dtype=torch.bfloat16)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, (grad.double() @ weight.dense).bfloat16())


def test_the_gradient_of_a_sum_is_expanded(generator: torch.Generator) -> None:
    weight = Weight(24, 64, 32, generator, "int4")
    x = torch.zeros(3, 64, requires_grad=True)
    torch.ops.hfq.cpu_linear(x, *weight.operands, None, *weight.sizes, False).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight.dense.sum(0).float().expand(3, 64))


# ---- processors without 16-bit products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slow_dtypes_are_multiplied_in_float32(
    dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = Weight(50, 128, 64, generator, "int4")
    codes, scales, zeros, codebook = weight.operands
    # Scales that 16 bits do not hold: only a product with the float32 weight gives its result.
    operands = (codes, scales * 1.0004, zeros, codebook)
    whole = ops.rows16_weight(operands, weight.sizes, torch.float32)
    grad = torch.randn(70, 50, generator=generator).to(dtype)
    wide, narrow = (grad.float() @ whole).to(dtype), grad @ whole.to(dtype)
    assert not torch.equal(wide, narrow)
    for slow, expected in ((dtype, wide), (torch.float64, narrow)):
        monkeypatch.setattr(dense_products, "_SLOW_DTYPES", frozenset({slow}))
        x = torch.randn(70, 128, generator=generator).to(dtype).requires_grad_()
        y = torch.ops.hfq.cpu_linear(x, *operands, None, *weight.sizes, False)
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)


def test_other_weights_are_widened_too(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(50, 64, generator=generator)
    product = ops.dequantized(lambda operands, sizes, dtype: whole.to(dtype))
    grad = torch.randn(5, 50, generator=generator).bfloat16()
    for slow, expected in (
        ({torch.bfloat16}, (grad.float() @ whole).bfloat16()),
        (set(), grad @ whole.bfloat16()),
    ):
        monkeypatch.setattr(dense_products, "_SLOW_DTYPES", frozenset(slow))
        assert torch.equal(product(grad, (), ()), expected)


# ---- gradients of gradients, compilers, autocast


def test_second_gradients(generator: torch.Generator) -> None:
    weight = Weight(17, 40, 8, generator, "int4")

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.hfq.cpu_linear_dequantized(x, *weight.operands, None, *weight.sizes)
        return y

    x = torch.randn(3, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product, (x,))
    assert torch.autograd.gradgradcheck(product, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = Weight(20, 64, 32, generator, "int4")
    grad = torch.randn(tokens, 20, generator=generator).to(dtype).requires_grad_()
    arguments: Any = (*weight.operands, *weight.sizes)
    torch.library.opcheck(torch.ops.hfq.cpu_linear_gradient.default, (grad, *arguments))
    out = torch.empty(20, 64, dtype=dtype)
    torch.library.opcheck(torch.ops.hfq.cpu_dequantize_into.default, (out, *arguments))


def test_compiled(generator: torch.Generator) -> None:
    weight = Weight(20, 64, 32, generator, "int4")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.hfq.cpu_linear(x * 2, *weight.operands, None, *weight.sizes, False)
        return y

    for tokens in (3, 5):
        x = torch.randn(tokens, 64, generator=generator, requires_grad=True)
        grad = integers(tokens, 20, generator=generator, dtype=torch.float32)
        compiled(x).backward(grad)
        assert x.grad is not None
        assert torch.equal(x.grad, (2 * (grad.double() @ weight.dense)).float())


def test_autocast_does_not_change_the_dtype(generator: torch.Generator) -> None:
    weight = Weight(20, 64, 32, generator, "int4")
    grad = torch.randn(5, 20, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = weight.gradient(grad)
    assert torch.equal(found, grad @ weight.dense.float())


# ---- memory


def test_results_outlive_the_next_call(generator: torch.Generator) -> None:
    weights = [Weight(*shape, generator, "int4") for shape in SHAPES]
    for _ in range(2):
        grads = [
            integers(5, shape[0], generator=generator, dtype=torch.float32) for shape in SHAPES
        ]
        found = [weight.gradient(grad) for weight, grad in zip(weights, grads, strict=True)]
        for weight, grad, one in zip(weights, grads, found, strict=True):
            assert torch.equal(one, (grad.double() @ weight.dense).float())


def test_threads_have_memory_of_their_own(generator: torch.Generator) -> None:
    weights = [Weight(256, 256, 32, generator, kind) for kind in ("int4", "int8")]
    grad = integers(4, 256, generator=generator, dtype=torch.float32)
    wrong: list[str] = []

    def work(weight: Weight) -> None:
        expected = (grad.double() @ weight.dense).float()
        for turn in range(50):
            if not torch.equal(weight.gradient(grad), expected):
                wrong.append(f"{weight.sizes}, turn {turn}")

    threads = [threading.Thread(target=work, args=(weight,)) for weight in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scratch_is_the_same_memory_until_it_is_too_small() -> None:
    first = scratch.scratch((16, 8), torch.float32)
    second = scratch.scratch((4, 4), torch.bfloat16)
    assert first.shape == (16, 8) and first.dtype == torch.float32
    assert second.shape == (4, 4) and second.dtype == torch.bfloat16
    assert first.data_ptr() == second.data_ptr()
    assert first.untyped_storage().nbytes() == 16 * 8 * 4
    assert scratch.scratch((32, 8), torch.float32).untyped_storage().nbytes() == 32 * 8 * 4
    with torch.device("meta"):
        assert scratch.scratch((64, 8), torch.float32).device.type == "cpu"


def test_scratch_does_not_keep_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_LARGEST", 1024)
    kept = scratch.scratch((256,), torch.float32)
    large = scratch.scratch((257,), torch.float32)
    assert large.shape == (257,) and large.data_ptr() != kept.data_ptr()
    assert scratch.scratch((256,), torch.float32).data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_into(isa: str, kind: str, generator: torch.Generator) -> None:
    weight = Weight(17, 130, 64, generator, kind)
    for dtype in FLOATS:
        out = torch.full((17, 130), torch.nan, dtype=dtype)
        torch.ops.hfq.cpu_dequantize_into(out, *weight.operands, *weight.sizes)
        assert torch.equal(out.double(), weight.dense)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(17, 129), r"out must be of shape \[17, 130\]"),
        (torch.empty(18, 130), r"out must be of shape \[17, 130\]"),
        (torch.empty(130, 17).T, "out must be contiguous"),
        (torch.empty(17, 130, dtype=torch.float64), "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_dequantize_into_checks_where_it_writes(
    out: Tensor, message: str, generator: torch.Generator
) -> None:
    weight = Weight(17, 130, 64, generator, "int4")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hfq.cpu_dequantize_into(out, *weight.operands, *weight.sizes)
