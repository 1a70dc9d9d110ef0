"""Schemas of the ``hfq::`` operators, their fakes (shape functions) and their gradients.

M tokens, N out_features, K in_features, G groups per row. A weight is ``(code - zero) * scale`` per group, or
``codebook[code] * scale``; see `hfq.core.weight.PackedGrid` for the operands. Two layouts of the operands (more in `hfq.kernels.cuda_ops` and `cuda_int8_ops`):

    neutral   qweight uint8 [N, B, 1], scales/zeros [N, G]               as stored (hfq.core.bits)
    rows16    qweight uint8 [N16, W, 16, 4], scales/zeros [N16, G, 16]   CPU kernels (hfq.kernels.rows16); with 8 bits and a codebook, which
                                                                         has to be that of E4M3 (hfq.core.float8), one group per row

    dequantize               neutral -> [N, K]                    PyTorch reference; the next one where it runs
    cuda_dequantize_neutral  neutral -> [N, K]                    native on CUDA; elsewhere the reference
    linear                   x, neutral -> x W^T + bias           dequantize, then a matrix product
    cpu_dequantize           rows16 -> [N, K]                     native
    cpu_dequantize_into      out [N, K], rows16                   native; into memory of the caller
    cpu_lookup               index [T], rows16 -> [T, K]          native; rows of a table; no gradient, index is int64
    cpu_linear               x, rows16 -> x W^T + bias            native; float32 or int8 activations
    cpu_linear_dequantized   x, rows16 -> x W^T + bias            cpu_dequantize, then a matrix product
    cpu_linear_gradient      grad, rows16 -> grad W               cpu_dequantize_into, then a matrix product
    cpu_experts_linear       x, counts, stacks of rows16          native; no gradient (hfq.kernels.row)
    int8_linear              x, neutral -> x W^T + bias           x quantized to int8, integers (hfq.kernels.int8)
    cpu_int8_linear          x, rows16 -> x W^T + bias            the same, native

Packed operands are never differentiated. The products have the gradient of x, computed from the packed
operands again, so that training keeps no float copy of the weight. Where x is quantized, its rounding counts as the
identity (the straight-through estimator of Bengio et al., 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import cuda_machine, int8, reference
from .dense_products import linear_by_parts, matmul, native_dtype, widened
from .rows16 import ROWS
from .scratch import scratch

__all__ = [
    "GRID",
    "LIBRARY",
    "SIZES",
    "define_product",
    "dequantized",
    "register_gradient",
    "register_second_gradient",
    "rows16_matmul",
    "rows16_product",
    "rows16_weight",
]

# Any, and not checked: torch does not annotate the class.
LIBRARY: Any = torch.library.Library("hfq", "DEF")  # type: ignore[no-untyped-call]

# Of every operator that takes a weight.
GRID = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? codebook"
SIZES = "int bits, int group_size, int in_features"
_INT8 = "Tensor x, Tensor qweight, Tensor scales, Tensor? input_scale, Tensor? bias"
_ROWS16 = f"{GRID}, Tensor? bias, {SIZES}, int out_features"

for _schema in (
    f"dequantize({GRID}, Tensor? g_idx, {SIZES}, ScalarType dtype) -> Tensor",
    f"cuda_dequantize_neutral({GRID}, Tensor? g_idx, {SIZES}, ScalarType dtype) -> Tensor",
    f"linear(Tensor x, {GRID}, Tensor? g_idx, Tensor? bias, {SIZES}) -> Tensor",
    f"cpu_dequantize({GRID}, {SIZES}, int out_features, ScalarType dtype) -> Tensor",
    f"cpu_dequantize_into(Tensor(a!) out, {GRID}, {SIZES}, int out_features) -> ()",
    f"cpu_linear_gradient(Tensor grad, {GRID}, {SIZES}, int out_features) -> Tensor",
    f"cpu_lookup(Tensor index, {GRID}, {SIZES}, int out_features, ScalarType dtype) -> Tensor",
    f"cpu_linear_dequantized(Tensor x, {_ROWS16}) -> Tensor",
    f"cpu_experts_linear(Tensor x, Tensor counts, {_ROWS16}, bool int8_activations) -> Tensor",
    f"int8_linear({_INT8}, int in_features) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))


def define_product(schema: str) -> None:
    """Define a native product ``name(...)``, and ``name.inference(...)``: the same without a gradient.

    A call of the first passes through the Python code of its gradient even where none is wanted, 15 us that an eager call
    could go around (`torch._C._AutoDispatchBelowAutograd`), but a compiled one cannot.
    """
    name, arguments = schema.split("(", 1)
    for overload in (name, f"{name}.inference"):
        LIBRARY.define(f"{overload}({arguments}", tags=(torch.Tag.needs_fixed_stride_order,))


define_product(f"cpu_linear(Tensor x, {_ROWS16}, bool int8_activations) -> Tensor")
define_product(f"cpu_int8_linear({_INT8}, int in_features, int out_features) -> Tensor")


# ---- implementations in PyTorch


def _dequantize(qweight: Tensor, *arguments: Any) -> Tensor:
    if qweight.is_cuda and cuda_machine.reason() is None:
        weight: Tensor = torch.ops.hfq.cuda_dequantize_neutral(qweight, *arguments)
        return weight
    return reference.dequantize(qweight, *arguments)


def _linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    weight = torch.ops.hfq.dequantize(
        qweight, scales, zeros, codebook, g_idx, bits, group_size, in_features, x.dtype
    )
    return matmul(x, weight, bias)


def _cpu_linear_dequantized(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    operands = (qweight, scales, zeros, codebook)
    return rows16_matmul(x, operands, (bits, group_size, in_features, out_features), bias)


def _cpu_linear_gradient(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    wide = widened(grad)
    weight = scratch((out_features, in_features), native_dtype(wide.dtype))
    sizes = (bits, group_size, in_features, out_features)
    torch.ops.hfq.cpu_dequantize_into(weight, qweight, scales, zeros, codebook, *sizes)
    return matmul(wide, weight.to(wide.dtype).T, None).to(grad.dtype)


# Weights that `rows16_matmul` dequantizes at a time. Measured (4096 x 4096 of 8 bits to float32, one thread, 64 tokens): 2^22 25 ms, 2^20 26, 2^18 31;
# the whole weight in memory that is used again 28, in new memory 34.
_PIECE = 1 << 22


def rows16_matmul(
    x: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...], bias: Tensor | None
) -> Tensor:
    """``x W^T + bias`` by the matrix library in the dtype of x, some rows of W after the other, in memory that is used again.

    Args:
        operands, sizes: as for `rows16_weight`.
    """
    return linear_by_parts(x, _rows16_parts(operands, sizes, x.dtype), bias, sizes[3])


def _rows16_parts(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    qweight, scales, zeros, codebook = operands
    bits, group_size, columns, rows = sizes[:4]
    step = max(1, _PIECE // (ROWS * columns)) * ROWS
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        count, blocks = part.stop - first, slice(first // ROWS, (first + step) // ROWS)
        weight = scratch((count, columns), native_dtype(dtype))
        torch.ops.hfq.cpu_dequantize_into(
            weight,
            qweight[blocks],
            scales[blocks],
            None if zeros is None else zeros[blocks],
            codebook,
            *(bits, group_size, columns, count),
        )
        yield part, weight.to(dtype)


def rows16_weight(operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` behind operands in layout rows16, in any float dtype.

    Args:
        sizes: bits, group_size, in_features, out_features.
    """
    weight: Tensor = torch.ops.hfq.cpu_dequantize(*operands, *sizes[:4], native_dtype(dtype))
    return weight.to(dtype)


LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
LIBRARY.impl("cuda_dequantize_neutral", reference.dequantize, "CompositeExplicitAutograd")
LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("int8_linear", int8.int8_linear, "CompositeExplicitAutograd")
LIBRARY.impl("cpu_linear_dequantized", _cpu_linear_dequantized, "CPU")
LIBRARY.impl("cpu_linear_gradient", _cpu_linear_gradient, "CPU")


# ---- shapes


def _fake_dequantize(qweight: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    in_features, dtype = rest[-2:]
    return qweight.new_empty((*qweight.shape[:-2], in_features), dtype=dtype)


def _fake_cpu_dequantize(qweight: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    in_features, out_features, dtype = rest[-3:]
    return qweight.new_empty((out_features, in_features), dtype=dtype)


def _fake_cpu_dequantize_into(out: Tensor, *rest: Any) -> None:
    return None


def _fake_cpu_linear_gradient(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], rest[-2]))


def _fake_cpu_lookup(index: Tensor, qweight: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    in_features, _, dtype = rest[-3:]
    return qweight.new_empty((index.shape[0], in_features), dtype=dtype)


def _fake_linear(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _fake_cpu_linear(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-2]))


def _fake_cpu_linear_dequantized(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-1]))


_FAKES: dict[str, Callable[..., Tensor | None]] = {
    "dequantize": _fake_dequantize,
    "cuda_dequantize_neutral": _fake_dequantize,
    "linear": _fake_linear,
    "cpu_dequantize": _fake_cpu_dequantize,
    "cpu_dequantize_into": _fake_cpu_dequantize_into,
    "cpu_linear_gradient": _fake_cpu_linear_gradient,
    "cpu_lookup": _fake_cpu_lookup,
    "cpu_linear": _fake_cpu_linear,
    "cpu_linear.inference": _fake_cpu_linear,
    "cpu_linear_dequantized": _fake_cpu_linear_dequantized,
    "cpu_experts_linear": _fake_cpu_linear,
    "int8_linear": _fake_linear,
    "cpu_int8_linear": _fake_cpu_linear_dequantized,  # out_features stands last, too
    "cpu_int8_linear.inference": _fake_cpu_linear_dequantized,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"hfq::{_name}", _fake, lib=LIBRARY)


# ---- gradients: dL/dx = dL/dy W, with W from the packed operands


def register_gradient(name: str, operand_count: int, product: Callable[..., Tensor]) -> None:
    """Give ``hfq::<name>(x, *operands, bias, *sizes)`` its gradient.

    Args:
        operand_count: packed tensors between x and bias.
        product: (grad, operands, sizes) -> grad W, grad `[..., N]` and the weight W `[N, K]`.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        bias = inputs[1 + operand_count]
        ctx.save_for_backward(*inputs[1 : 1 + operand_count])
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.sizes = inputs[2 + operand_count :]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, ctx.saved_tensors, ctx.sizes)
        if ctx.needs_input_grad[1 + operand_count]:
            grad_bias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
        return (grad_x, *[None] * operand_count, grad_bias, *[None] * len(ctx.sizes))

    torch.library.register_autograd(
        f"hfq::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def dequantized(weight: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product for `register_gradient` from (operands, sizes, dtype) -> `[N, K]`."""

    def product(grad: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
        wide = widened(grad) if grad.device.type == "cpu" else grad
        return (wide @ weight(operands, sizes, wide.dtype)).to(grad.dtype)

    return product


def _neutral_weight(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    weight: Tensor = torch.ops.hfq.dequantize(*operands, *sizes[:3], dtype)
    return weight


def _int8_weight(operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    qweight, scales, _ = operands
    return _neutral_weight((qweight, scales, None, None, None), (8, sizes[0], sizes[0]), dtype)


def rows16_product(grad: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
    """A product for `register_gradient` from operands and sizes in layout rows16."""
    product: Tensor = torch.ops.hfq.cpu_linear_gradient(grad, *operands, *sizes[:4])
    return product


def _cpu_int8_product(grad: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
    qweight, scales, _ = operands
    columns, rows = sizes
    return rows16_product(grad, (qweight, scales, None, None), (8, columns, columns, rows))


register_gradient("linear", 5, dequantized(_neutral_weight))
register_gradient("cpu_linear", 4, rows16_product)
register_gradient("cpu_linear_dequantized", 4, rows16_product)
register_gradient("int8_linear", 3, dequantized(_int8_weight))
register_gradient("cpu_int8_linear", 3, _cpu_int8_product)


# Gradients of gradients: d(grad W) = d(grad) W, so that of grad is a product with W^T.


def register_second_gradient(
    name: str, product: Callable[..., Tensor], operand_count: int = 4
) -> None:
    """Give ``hfq::<name>(grad, *operands, *sizes)``, grad W, its gradient.

    Args:
        product: (x, operands, sizes) -> x W^T.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1 : 1 + operand_count])
        ctx.sizes = inputs[1 + operand_count :]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = product(grad, ctx.saved_tensors, ctx.sizes)
        return (grad_x, *[None] * (operand_count + len(ctx.sizes)))

    torch.library.register_autograd(
        f"hfq::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def _rows16_transposed(x: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
    y = torch.ops.hfq.cpu_linear_dequantized(widened(x), *operands, None, *sizes)
    out: Tensor = y.to(x.dtype)
    return out


register_second_gradient("cpu_linear_gradient", _rows16_transposed)
