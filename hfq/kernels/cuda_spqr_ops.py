"""Operators ``hfq::cuda_spqr_*``: schemas, fakes, gradients, and what each computes in PyTorch.

    cuda_spqr_dequantize          tiles -> [N, K]               native on CUDA; elsewhere the reference
    cuda_spqr_lookup              index [T], tiles -> [T, K]    the same; rows of a table; no gradient, index is int64
    cuda_spqr_linear              x, tiles -> x W^T + bias      the same; x [M, K] in float16 or bfloat16
    cuda_spqr_linear_dequantized  x, tiles -> x W^T + bias      cuda_spqr_dequantize, then a matrix product; some rows of W at a time
    cuda_spqr_linear_gradient     grad, tiles -> grad W         the same
    cuda_spqr_experts_linear      x, counts, stacks of tiles    native on CUDA; no gradient; see `hfq.kernels.cuda_ops`

Tiles: qweight in layout fragments with ``halves=True``, stat_codes as in `hfq.kernels.spqr_fragments`, all else as in
`hfq.kernels.spqr_ops`; K is a multiple of 8, groups of 16 columns, stat_group_size of 16 rows. Offsets may be those of some
neighbouring rows of a larger weight, with the columns and values of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.bits import packed_bytes
from ..core.spec import group_count
from . import fragments, reference, spqr_fragments
from .cuda_products import fake_linear, register_shapes_and_gradients
from .dense_products import (
    CHUNK,
    experts_by_parts,
    gradient_by_parts,
    linear_by_parts,
    matmul,
    native_dtype,
)
from .ops import LIBRARY, define_product
from .spqr_ops import GRID, OPERANDS, SIZES

__all__ = ["spqr_fragments_weight"]

_LINEAR = f"Tensor x, {GRID}, Tensor? bias, {SIZES}, int out_features"

for _schema in (
    f"cuda_spqr_dequantize({GRID}, {SIZES}, int out_features, ScalarType dtype) -> Tensor",
    f"cuda_spqr_lookup(Tensor index, {GRID}, {SIZES}, int out_features, ScalarType dtype) -> Tensor",
    f"cuda_spqr_linear_dequantized({_LINEAR}) -> Tensor",
    f"cuda_spqr_linear_gradient(Tensor grad, {GRID}, {SIZES}, int out_features) -> Tensor",
    f"cuda_spqr_experts_linear(Tensor x, Tensor counts, {GRID}, Tensor? bias, {SIZES}, int out_features) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))

define_product(f"cuda_spqr_linear({_LINEAR}) -> Tensor")


def spqr_fragments_weight(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The weight `[N, K]` behind tiles, in any float dtype.

    Args:
        operands: qweight, stat_codes, stats, offsets, columns, values.
        sizes: bits, group_size, stat_bits, stat_group_size, in_features, out_features.
    """
    weight: Tensor = torch.ops.hfq.cuda_spqr_dequantize(*operands, *sizes, native_dtype(dtype))
    return weight.to(dtype)


# ---- implementations in PyTorch


def _dequantize(
    qweight: Tensor,
    stat_codes: Tensor,
    stats: Tensor,
    offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    bits: int,
    group_size: int,
    stat_bits: int,
    stat_group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    codes = fragments.from_fragments(
        qweight, (out_features, in_features * bits // 8, 1), bits, halves=True
    )
    stat_bytes = packed_bytes(2 * group_count(in_features, group_size), stat_bits)
    stat_rows = spqr_fragments.from_stat_pairs(stat_codes, (out_features, stat_bytes, 1), stat_bits)
    first, last = int(offsets[0]), int(offsets[-1])
    outliers = (offsets - first, columns[first:last], values[first:last])
    sizes = (bits, group_size, stat_bits, stat_group_size, in_features)
    return reference.spqr_dequantize(codes, stat_rows, stats, *outliers, *sizes, dtype)


def _lookup(index: Tensor, *arguments: Any) -> Tensor:
    return _dequantize(*arguments)[index]


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    operands, bias, sizes = arguments[:OPERANDS], arguments[OPERANDS], arguments[OPERANDS + 1 :]
    return matmul(x, spqr_fragments_weight(operands, sizes, x.dtype), bias)


def _experts_linear(x: Tensor, counts: Tensor, *arguments: Any) -> Tensor:
    operands, bias, sizes = arguments[:OPERANDS], arguments[OPERANDS], arguments[OPERANDS + 1 :]

    def linear(tokens: Tensor, expert: int) -> Tensor:
        own = None if bias is None else bias[expert]
        return _linear(tokens, *(stack[expert] for stack in operands), own, *sizes)

    return experts_by_parts(x, counts, sizes[-1], linear)


def _linear_dequantized(x: Tensor, *arguments: Any) -> Tensor:
    operands, bias, sizes = arguments[:OPERANDS], arguments[OPERANDS], arguments[OPERANDS + 1 :]
    return linear_by_parts(x, _parts(operands, sizes, x.dtype), bias, sizes[-1])


def _linear_gradient(grad: Tensor, *arguments: Any) -> Tensor:
    operands, sizes = arguments[:OPERANDS], arguments[OPERANDS:]
    return gradient_by_parts(grad, _parts(operands, sizes, grad.dtype), *sizes[-2:])


def _parts(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows of the weight, dequantized; each begins with rows that share statistics."""
    qweight, stat_codes, stats, offsets, columns, values = operands
    *others, stat_group_size, in_features, out_features = sizes
    step = max(1, CHUNK // (in_features * dtype.itemsize * stat_group_size)) * stat_group_size
    for first in range(0, out_features, step):
        last = min(out_features, first + step)
        tiles = slice(first // fragments.ROWS, -(-last // fragments.ROWS))
        blocks = slice(first // stat_group_size, -(-last // stat_group_size))
        part = (qweight[tiles], stat_codes[tiles], stats[blocks], offsets[first : last + 1])
        part_sizes = (*others, stat_group_size, in_features, last - first)
        weight = spqr_fragments_weight((*part, columns, values), part_sizes, dtype)
        yield slice(first, last), weight


for _name, _implementation in (
    ("cuda_spqr_dequantize", _dequantize),
    ("cuda_spqr_lookup", _lookup),
    ("cuda_spqr_linear", _linear),
    ("cuda_spqr_linear.inference", _linear),
    ("cuda_spqr_linear_dequantized", _linear_dequantized),
    ("cuda_spqr_linear_gradient", _linear_gradient),
    ("cuda_spqr_experts_linear", _experts_linear),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


register_shapes_and_gradients("cuda_spqr", OPERANDS)
torch.library.register_fake("hfq::cuda_spqr_experts_linear", fake_linear, lib=LIBRARY)
