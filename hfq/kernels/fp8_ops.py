"""Operators ``hfq::fp8_*``: schemas, shapes and gradients. See `hfq.core.weight.Fp8Grid` for the operands.

M tokens, N out_features, K in_features; qweight uint8 [N, K, 1], scales float32 [N, 1], as stored (hfq.formats.fp8).

    fp8_dequantize     -> [N, K]             PyTorch
    fp8_linear         x -> x W^T + bias     a matrix product with dequantized rows; x as it is or rounded to E4M3
    fp8_scaled_linear  x -> x W^T + bias     x rounded to E4M3, `torch._scaled_mm`

As for the operators in `hfq.kernels.ops`: only x and bias have gradients, from the packed operands, and the rounding of
x counts as the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fp8
from .ops import LIBRARY, dequantized, register_gradient, widened

__all__: list[str] = []

_OPERANDS = "Tensor qweight, Tensor scales, Tensor? input_scale"

for _schema in (
    "fp8_dequantize(Tensor qweight, Tensor scales, ScalarType dtype) -> Tensor",
    f"fp8_linear(Tensor x, {_OPERANDS}, Tensor? bias, bool fp8_activations) -> Tensor",
    f"fp8_scaled_linear(Tensor x, {_OPERANDS}, Tensor? bias) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))


def _linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    fp8_activations: bool,
) -> Tensor:
    if fp8_activations:
        return fp8.linear(x, qweight, scales, input_scale, bias)
    tokens = x.reshape(-1, x.shape[-1])
    # Autocast would choose the dtype of the product; the schema's fake promises that of x.
    with torch.autocast(x.device.type, enabled=False):
        y = fp8.product(widened(tokens) if x.is_cpu else tokens, qweight, scales)
    return fp8.output(y, bias, x)


LIBRARY.impl("fp8_dequantize", fp8.dequantize, "CompositeExplicitAutograd")
LIBRARY.impl("fp8_linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("fp8_scaled_linear", fp8.scaled_linear, "CompositeExplicitAutograd")


def _fake_dequantize(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return qweight.new_empty(qweight.shape[:-1], dtype=dtype)


def _fake_linear(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


for _name, _fake in (
    ("fp8_dequantize", _fake_dequantize),
    ("fp8_linear", _fake_linear),
    ("fp8_scaled_linear", _fake_linear),
):
    torch.library.register_fake(f"hfq::{_name}", _fake, lib=LIBRARY)


def _weight(operands: tuple[Any, ...], sizes: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    qweight, scales, _ = operands
    weight: Tensor = torch.ops.hfq.fp8_dequantize(qweight, scales, dtype)
    return weight


register_gradient("fp8_linear", 3, dequantized(_weight))
register_gradient("fp8_scaled_linear", 3, dequantized(_weight))
