"""Operators ``hfq::spqr_*``: schemas, PyTorch implementations, fakes and gradients. See `hfq.core.weight.SpqrGrid`.

M tokens, N out_features, K in_features, G groups per row, R blocks of rows that share stats, Z outliers.

    neutral   qweight uint8 [N, B, 1], stat_codes uint8 [N, S, 1]                   as stored (hfq.formats.spqr)
    rows16    qweight uint8 [N16, W, 16, 4], stat_codes uint8 [N16, V, 16, 4]       CPU kernels (hfq.kernels.rows16)
    both      stats float [R, G, 4], offsets int32 [N + 1], columns int16 or int32 [Z], values float [Z]

    spqr_dequantize              neutral -> [N, K]              PyTorch reference
    spqr_linear                  x, neutral -> x W^T + bias     dequantize, then a matrix product
    cpu_spqr_dequantize          rows16 -> [N, K]               native
    cpu_spqr_linear              x, rows16 -> x W^T + bias      native, dense and sparse in one pass, float32 activations
    cpu_spqr_linear_dequantized  x, rows16 -> x W^T + bias      cpu_spqr_dequantize, then a matrix product

As for the operators in `hfq.kernels.ops`: only x and bias have gradients, from the packed operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dense_products import matmul
from .ops import LIBRARY, define_product, dequantized, register_gradient

__all__ = ["GRID", "OPERANDS", "SIZES", "spqr_rows16_weight"]

GRID = (
    "Tensor qweight, Tensor stat_codes, Tensor stats, Tensor offsets, Tensor columns, Tensor values"
)
SIZES = "int bits, int group_size, int stat_bits, int stat_group_size, int in_features"
OPERANDS = 6

for _schema in (
    f"spqr_dequantize({GRID}, {SIZES}, ScalarType dtype) -> Tensor",
    f"spqr_linear(Tensor x, {GRID}, Tensor? bias, {SIZES}) -> Tensor",
    f"cpu_spqr_dequantize({GRID}, {SIZES}, int out_features, ScalarType dtype) -> Tensor",
    f"cpu_spqr_linear_dequantized(Tensor x, {GRID}, Tensor? bias, {SIZES}, int out_features) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))

define_product(
    f"cpu_spqr_linear(Tensor x, {GRID}, Tensor? bias, {SIZES}, int out_features) -> Tensor"
)


def _neutral_weight(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    weight: Tensor = torch.ops.hfq.spqr_dequantize(*operands, *sizes, dtype)
    return weight


def spqr_rows16_weight(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The weight `[N, K]` behind operands in layout rows16; float64 is a float32 weight, widened.

    Args:
        sizes: bits, group_size, stat_bits, stat_group_size, in_features, out_features.
    """
    native = torch.float32 if dtype == torch.float64 else dtype
    weight: Tensor = torch.ops.hfq.cpu_spqr_dequantize(*operands, *sizes, native)
    return weight.to(dtype)


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    operands, bias, sizes = arguments[:OPERANDS], arguments[OPERANDS], arguments[OPERANDS + 1 :]
    return matmul(x, _neutral_weight(operands, sizes, x.dtype), bias)


def _cpu_linear_dequantized(x: Tensor, *arguments: Any) -> Tensor:
    operands, bias, sizes = arguments[:OPERANDS], arguments[OPERANDS], arguments[OPERANDS + 1 :]
    return matmul(x, spqr_rows16_weight(operands, sizes, x.dtype), bias)


LIBRARY.impl("spqr_dequantize", reference.spqr_dequantize, "CompositeExplicitAutograd")
LIBRARY.impl("spqr_linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("cpu_spqr_linear_dequantized", _cpu_linear_dequantized, "CPU")


def _fake_dequantize(qweight: Tensor, *rest: Any) -> Tensor:
    return qweight.new_empty((qweight.shape[0], rest[-2]), dtype=rest[-1])


def _fake_cpu_dequantize(qweight: Tensor, *rest: Any) -> Tensor:
    return qweight.new_empty((rest[-2], rest[-3]), dtype=rest[-1])


def _fake_linear(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _fake_cpu_linear(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-1]))


_FAKES: dict[str, Callable[..., Tensor]] = {
    "spqr_dequantize": _fake_dequantize,
    "spqr_linear": _fake_linear,
    "cpu_spqr_dequantize": _fake_cpu_dequantize,
    "cpu_spqr_linear": _fake_cpu_linear,
    "cpu_spqr_linear.inference": _fake_cpu_linear,
    "cpu_spqr_linear_dequantized": _fake_cpu_linear,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"hfq::{_name}", _fake, lib=LIBRARY)

register_gradient("spqr_linear", OPERANDS, dequantized(_neutral_weight))
register_gradient("cpu_spqr_linear", OPERANDS, dequantized(spqr_rows16_weight))
register_gradient("cpu_spqr_linear_dequantized", OPERANDS, dequantized(spqr_rows16_weight))
