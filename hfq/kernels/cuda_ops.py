"""Operators on the layout ``fragments`` (hfq.kernels.fragments): schemas, fakes, gradients, and what each computes in PyTorch.

    cuda_dequantize          fragments -> [N, K]                  native on CUDA; elsewhere the reference
    cuda_lookup              index [T], fragments -> [T, K]       the same; rows of a table; no gradient, index is int64
    cuda_linear              x, fragments -> x W^T + bias         the same; x [M, K] in float16 or bfloat16, for few tokens
    cuda_linear_dequantized  x, fragments -> x W^T + bias         cuda_dequantize, then a matrix product; some rows of W at a time
    cuda_linear_gradient     grad, fragments -> grad W            the same
    cuda_experts_linear      x, counts, stacks of fragments       native on CUDA; elsewhere the reference; no gradient; see below

See `hfq.kernels.ops` for the operands. A codebook of 8 bits has 256 values, those of E4M3 (`hfq.core.float8`), which native code takes
from the codes themselves. Native products are of integers in 16 bits, which are exact, summed in float32 and scaled
there: no weight is rounded to the dtype of x, but with more than 64 tokens on compute capability 9.0 (kernels/cuda/wgmma_pair.h).
Entries of a codebook of 4 bits are. One token of 4-bit integers is rounded to 22 bits below the largest of 128 columns
(linear_digits_kernel.h), and where HFQ_CUDA_DIGITS is 1, on compute capability 9.0, one of a large weight with a codebook of 4 bits,
too, whose entries are then rounded to 1/8191 of the largest (wide_digits.h). Up to 16 bfloat16 tokens times integers of 2, 4 or 8 bits are cut at 2^-18 of a code times the largest of 16
activations, and an infinity, or what is 2^64 or more, becomes NaN (wide_kernel.h and wgmma_staged.h, on compute capability 9.0).

``cuda_experts_linear`` multiplies the first ``counts[0]`` tokens with weight 0, the next ones with weight 1, ... (counts int64 `[E]`,
every tensor of the weight and bias with E in front); rows behind the sum of counts become zeros. On CUDA the host never learns the
counts, so that nothing checks them: where they are negative or add up to more than M, what y holds is not specified.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import fragments, reference
from .cuda_products import fake_linear, register_shapes_and_gradients
from .dense_products import (
    CHUNK,
    experts_by_parts,
    gradient_by_parts,
    linear_by_parts,
    matmul,
    native_dtype,
)
from .ops import GRID, LIBRARY, SIZES, define_product

__all__ = ["fragments_weight"]

_LINEAR = f"Tensor x, {GRID}, Tensor? bias, {SIZES}, int out_features"

for _schema in (
    f"cuda_dequantize({GRID}, {SIZES}, int out_features, ScalarType dtype) -> Tensor",
    f"cuda_lookup(Tensor index, {GRID}, {SIZES}, int out_features, ScalarType dtype) -> Tensor",
    f"cuda_linear_dequantized({_LINEAR}) -> Tensor",
    f"cuda_linear_gradient(Tensor grad, {GRID}, {SIZES}, int out_features) -> Tensor",
    f"cuda_experts_linear(Tensor x, Tensor counts, {GRID}, Tensor? bias, {SIZES}, int out_features) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))

define_product(f"cuda_linear({_LINEAR}) -> Tensor")


def fragments_weight(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The weight `[N, K]` behind qweight, scales, zeros and codebook in layout fragments, in any float dtype.

    Args:
        sizes: bits, group_size, in_features, out_features.
    """
    weight: Tensor = torch.ops.hfq.cuda_dequantize(*operands, *sizes, native_dtype(dtype))
    return weight.to(dtype)


# ---- implementations in PyTorch


def _dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (out_features, in_features * bits // 8, 1)
    codes = fragments.from_fragments(qweight, shape, bits)
    grid = [
        None
        if tensor is None
        else fragments.from_fragments(tensor, (out_features, scales.shape[-3]), bits)
        for tensor in (scales, zeros)
    ]
    assert grid[0] is not None
    sizes = (bits, group_size, in_features)
    return reference.dequantize(codes, grid[0], grid[1], codebook, None, *sizes, dtype)


def _lookup(index: Tensor, *arguments: Any) -> Tensor:
    return _dequantize(*arguments)[index]


def _linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    *sizes: int,
) -> Tensor:
    return matmul(x, fragments_weight((qweight, scales, zeros, codebook), sizes, x.dtype), bias)


def _experts_linear(
    x: Tensor,
    counts: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    *sizes: int,
) -> Tensor:
    def linear(tokens: Tensor, expert: int) -> Tensor:
        operands = [None if stack is None else stack[expert] for stack in (qweight, scales, zeros)]
        own = None if bias is None else bias[expert]
        return _linear(tokens, *operands, codebook, own, *sizes)  # type: ignore[arg-type]  # the first two are there

    return experts_by_parts(x, counts, sizes[3], linear)


def _linear_dequantized(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    *sizes: int,
) -> Tensor:
    parts = _parts((qweight, scales, zeros, codebook), sizes, x.dtype)
    return linear_by_parts(x, parts, bias, sizes[3])


def _linear_gradient(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    *sizes: int,
) -> Tensor:
    parts = _parts((qweight, scales, zeros, codebook), sizes, grad.dtype)
    return gradient_by_parts(grad, parts, *sizes[2:])


def _parts(
    operands: tuple[Any, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows of the weight, dequantized."""
    qweight, scales, zeros, codebook = operands
    bits, group_size, in_features, out_features = sizes
    tiles = max(1, CHUNK // (in_features * dtype.itemsize * fragments.ROWS))
    for first in range(0, qweight.shape[0], tiles):
        of_part = slice(first, first + tiles)
        rows = slice(first * fragments.ROWS, min(out_features, (first + tiles) * fragments.ROWS))
        part = (qweight[of_part], scales[of_part], None if zeros is None else zeros[of_part])
        part_sizes = (bits, group_size, in_features, rows.stop - rows.start)
        yield rows, fragments_weight((*part, codebook), part_sizes, dtype)


for _name, _implementation in (
    ("cuda_dequantize", _dequantize),
    ("cuda_lookup", _lookup),
    ("cuda_linear", _linear),
    ("cuda_linear.inference", _linear),
    ("cuda_linear_dequantized", _linear_dequantized),
    ("cuda_linear_gradient", _linear_gradient),
    ("cuda_experts_linear", _experts_linear),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


register_shapes_and_gradients("cuda", 4)
torch.library.register_fake("hfq::cuda_experts_linear", fake_linear, lib=LIBRARY)
