"""Operators of W8A8 on CUDA (`hfq.kernels.cuda_int8` says what layout ``signed`` is): schemas, fakes, gradients, PyTorch code.

    cuda_quantize_tokens     x [M, K] -> int8 [M, K], float32 [M, 1]    native on CUDA; elsewhere hfq.core.activations
    cuda_scale_sums          out [M, N], int32 [M, N]                   native on CUDA; sums times scales, plus bias, into out
    cuda_int8_linear         x, signed -> x W^T + bias                  the same; x quantized to int8, for few tokens
    cuda_int8_linear_cublas  x, signed -> x W^T + bias                  cuda_quantize_tokens, `torch._int_mm`, cuda_scale_sums
    cuda_int8_experts_linear x, counts, stacks of signed                native on CUDA; no gradient; see `hfq.kernels.cuda_ops`
    cuda_int8_dequantize     signed -> [N, K]                           native on CUDA

K is a multiple of 16 on CUDA. All give the numbers of `hfq.kernels.int8` to the bit. The rounding of x counts as the identity for
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.activations import quantize_tokens
from .cuda_products import fake_linear
from .dense_products import experts_by_parts, gradient_of_bytes, native_dtype
from .int8 import int8_linear, integer_product, scaled_sums
from .ops import LIBRARY, define_product, register_gradient

__all__ = ["PIECE", "signed_weight", "switched"]

PIECE = 16  # columns of a piece of the layout

# Bytes of int32 sums that are there at a time.
_SUMS = 256 << 20

_LINEAR = (
    "Tensor x, Tensor qweight, Tensor scales, Tensor? input_scale, Tensor? bias, int in_features, "
    "int out_features"
)
_SUM_OPERANDS = "Tensor sums, Tensor token_scales, Tensor scales, Tensor? bias"

for _schema in (
    "cuda_quantize_tokens(Tensor x, Tensor? input_scale) -> (Tensor, Tensor)",
    f"cuda_scale_sums(Tensor(a!) out, {_SUM_OPERANDS}) -> ()",
    f"cuda_int8_linear_cublas({_LINEAR}) -> Tensor",
    "cuda_int8_experts_linear(Tensor x, Tensor counts, Tensor qweight, Tensor scales, Tensor? bias, int in_features, "
    "int out_features) -> Tensor",
    "cuda_int8_dequantize(Tensor qweight, Tensor scales, ScalarType dtype) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))

define_product(f"cuda_int8_linear({_LINEAR}) -> Tensor")


def switched(codes: Tensor) -> Tensor:
    """Codes with the zero point 128 as two's complement, or the reverse: uint8, a new tensor."""
    return codes ^ 128


def signed_weight(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` behind qweight in layout signed and scales `[N, 1]`."""
    operands = (qweight.contiguous(), scales.contiguous())
    weight: Tensor = torch.ops.hfq.cuda_int8_dequantize(*operands, native_dtype(dtype))
    return weight.to(dtype)


# ---- implementations in PyTorch


def _scale_sums(
    out: Tensor, sums: Tensor, token_scales: Tensor, scales: Tensor, bias: Tensor | None
) -> None:
    out.copy_(scaled_sums(sums, token_scales, scales, bias))


def _dequantize(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    columns = qweight.shape[1] * PIECE
    codes = switched(qweight).view(-1, columns, 1)
    weight: Tensor = torch.ops.hfq.dequantize(
        codes, scales, None, None, None, 8, columns, columns, dtype
    )
    return weight


def _linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
) -> Tensor:
    codes = switched(qweight).view(out_features, in_features, 1)
    return int8_linear(x, codes, scales, input_scale, bias, in_features)


def _linear_cublas(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
) -> Tensor:
    codes, token_scales = torch.ops.hfq.cuda_quantize_tokens(x, input_scale)
    weight = qweight.view(torch.int8).view(out_features, in_features)
    y = x.new_empty((x.shape[0], out_features))
    step = max(1, _SUMS // (4 * max(1, out_features)))
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        # Columns that were added as padding go here.
        sums = integer_product(codes[part], weight).contiguous()
        torch.ops.hfq.cuda_scale_sums(y[part], sums, token_scales[part], scales, bias)
    return y


def _experts_linear(
    x: Tensor,
    counts: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
) -> Tensor:
    def linear(tokens: Tensor, expert: int) -> Tensor:
        own = None if bias is None else bias[expert]
        return _linear(
            tokens, qweight[expert], scales[expert], None, own, in_features, out_features
        )

    return experts_by_parts(x, counts, out_features, linear)


for _name, _implementation in (
    ("cuda_quantize_tokens", quantize_tokens),
    ("cuda_scale_sums", _scale_sums),
    ("cuda_int8_linear", _linear),
    ("cuda_int8_linear.inference", _linear),
    ("cuda_int8_linear_cublas", _linear_cublas),
    ("cuda_int8_experts_linear", _experts_linear),
    ("cuda_int8_dequantize", _dequantize),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


# ---- shapes


def _fake_quantize_tokens(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _fake_scale_sums(out: Tensor, *rest: Any) -> None:
    return None


def _fake_dequantize(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return qweight.new_empty((qweight.shape[0], qweight.shape[1] * PIECE), dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "cuda_quantize_tokens": _fake_quantize_tokens,
    "cuda_scale_sums": _fake_scale_sums,
    "cuda_int8_linear": fake_linear,
    "cuda_int8_linear.inference": fake_linear,
    "cuda_int8_linear_cublas": fake_linear,
    "cuda_int8_experts_linear": fake_linear,
    "cuda_int8_dequantize": _fake_dequantize,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"hfq::{_name}", _fake, lib=LIBRARY)


# ---- gradients


register_gradient("cuda_int8_linear", 3, gradient_of_bytes(signed_weight))
register_gradient("cuda_int8_linear_cublas", 3, gradient_of_bytes(signed_weight))
