"""Operators ``hfq::*fp8_*``: schemas, shapes and gradients. See `hfq.core.weight.Fp8Grid` for the operands.

M tokens, N out_features, K in_features; qweight uint8 [N, K, 1], scales float32 [N, 1], as stored (hfq.formats.fp8). On the CPU weights beside
float activations go through the operators of `hfq.kernels.ops`, with the table of E4M3 for a codebook.

    fp8_dequantize            -> [N, K]                         cuda_fp8_dequantize where it runs
    fp8_linear                x -> x W^T + bias                 a matrix product with dequantized rows; x as it is or rounded to E4M3
    fp8_scaled_linear         x -> x W^T + bias                 cuda_fp8_quantize_tokens, `torch._scaled_mm`
    fp8_widened_linear        x -> x W^T + bias                 cuda_fp8_quantize_tokens, a matrix product of bfloat16 with float32 sums
    cuda_fp8_quantize_tokens  x [M, K] -> E4M3, float32 [M, 1]  native on CUDA; elsewhere hfq.core.activations, the same to the bit
    cuda_fp8_linear           x [M, K] -> x W^T + bias          native on CUDA; x rounded to E4M3, for few tokens
    cuda_fp8_experts_linear   x, counts, stacks -> [M, N]       native on CUDA; no gradient; see hfq.kernels.cuda_ops
    cuda_fp8_dequantize       -> [N, K]                         native on CUDA
    cpu_fp8_round_tokens      x [M, K] -> float32 [M, K], [M, 1]  native on the CPU: what the codes of cuda_fp8_quantize_tokens stand for
    cpu_fp8_linear            x [M, K], rows16 -> x W^T + bias  native on the CPU; x rounded to E4M3
    cpu_fp8_linear_dequantized  the same                        cpu_fp8_round_tokens, cpu_dequantize, a matrix product of float32

On CUDA, K of the native ones that take x is a multiple of 16; the product is that of `hfq.kernels.fp8.linear` up to the order of float32 sums.

As for the operators in `hfq.kernels.ops`: only x and bias have gradients, from the packed operands, and the rounding of
x counts as the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.activations import quantize_tokens
from ..core.float8 import E4M3, e4m3_values
from . import cuda_machine, fp8, rows16
from .dense_products import experts_by_parts, gradient_of_bytes, native_dtype, widened
from .ops import LIBRARY, define_product, register_gradient, rows16_matmul, rows16_product

__all__: list[str] = []

_OPERANDS = "Tensor qweight, Tensor scales, Tensor? input_scale"
_ROWS16 = (
    "Tensor x, Tensor qweight, Tensor scales, Tensor codebook, Tensor? input_scale, Tensor? bias, "
    "int in_features, int out_features"
)

for _schema in (
    "fp8_dequantize(Tensor qweight, Tensor scales, ScalarType dtype) -> Tensor",
    f"fp8_linear(Tensor x, {_OPERANDS}, Tensor? bias, bool fp8_activations) -> Tensor",
    f"fp8_scaled_linear(Tensor x, {_OPERANDS}, Tensor? bias) -> Tensor",
    f"fp8_widened_linear(Tensor x, {_OPERANDS}, Tensor? bias) -> Tensor",
    "cuda_fp8_quantize_tokens(Tensor x, Tensor? input_scale) -> (Tensor, Tensor)",
    "cuda_fp8_experts_linear(Tensor x, Tensor counts, Tensor qweight, Tensor scales, Tensor? bias) -> Tensor",
    "cuda_fp8_dequantize(Tensor qweight, Tensor scales, ScalarType dtype) -> Tensor",
    "cpu_fp8_round_tokens(Tensor x, Tensor? input_scale) -> (Tensor, Tensor)",
    f"cpu_fp8_linear_dequantized({_ROWS16}) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))

define_product(f"cuda_fp8_linear(Tensor x, {_OPERANDS}, Tensor? bias) -> Tensor")
define_product(f"cpu_fp8_linear({_ROWS16}) -> Tensor")


def _dequantize(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    if not qweight.is_cuda or cuda_machine.reason() is not None:
        return fp8.dequantize(qweight, scales, dtype)
    operands = (qweight.contiguous(), scales.contiguous())
    weight: Tensor = torch.ops.hfq.cuda_fp8_dequantize(*operands, native_dtype(dtype))
    return weight.to(dtype)


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


def _quantize_tokens(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return quantize_tokens(x, input_scale, E4M3)


def _experts_linear(
    x: Tensor, counts: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    def linear(tokens: Tensor, expert: int) -> Tensor:
        own = None if bias is None else bias[expert]
        return fp8.linear(tokens, qweight[expert], scales[expert], None, own)

    return experts_by_parts(x, counts, qweight.shape[1], linear)


def _fake_experts_linear(x: Tensor, counts: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[1]))


def _round_tokens(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scales = quantize_tokens(x, input_scale, E4M3)
    return e4m3_values(codes.view(torch.uint8)), scales


def _cpu_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    codebook: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
) -> Tensor:
    codes = rows16.from_rows16(qweight, (out_features, in_features, 1))
    factors = rows16.from_rows16(scales, (out_features, 1))
    return fp8.linear(x, codes, factors, input_scale, bias)


def _cpu_linear_dequantized(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    codebook: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
) -> Tensor:
    values, token_scales = torch.ops.hfq.cpu_fp8_round_tokens(x, input_scale)
    # Without scales, which come at the end: so products are exact.
    operands = (qweight, torch.ones_like(scales), None, codebook)
    sizes = (8, in_features, in_features, out_features)
    sums = rows16_matmul(values, operands, sizes, None)
    factors = scales.flatten()[:out_features]
    return fp8.output(sums.mul_(token_scales * factors), bias, x)


for _name, _implementation in (
    ("fp8_dequantize", _dequantize),
    ("fp8_linear", _linear),
    ("fp8_scaled_linear", fp8.scaled_linear),
    ("fp8_widened_linear", fp8.widened_linear),
    ("cuda_fp8_quantize_tokens", _quantize_tokens),
    ("cuda_fp8_linear", fp8.linear),
    ("cuda_fp8_linear.inference", fp8.linear),
    ("cuda_fp8_experts_linear", _experts_linear),
    ("cuda_fp8_dequantize", fp8.dequantize),
    ("cpu_fp8_round_tokens", _round_tokens),
    ("cpu_fp8_linear", _cpu_linear),
    ("cpu_fp8_linear.inference", _cpu_linear),
    ("cpu_fp8_linear_dequantized", _cpu_linear_dequantized),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


def _fake_dequantize(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return qweight.new_empty(qweight.shape[:-1], dtype=dtype)


def _fake_linear(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _fake_quantize_tokens(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _fake_round_tokens(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(
        (x.shape[0], 1), dtype=torch.float32
    )


def _fake_cpu_linear(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], rest[-1]))


_FAKES: dict[str, Callable[..., Any]] = {
    "fp8_dequantize": _fake_dequantize,
    "fp8_linear": _fake_linear,
    "fp8_scaled_linear": _fake_linear,
    "fp8_widened_linear": _fake_linear,
    "cuda_fp8_quantize_tokens": _fake_quantize_tokens,
    "cuda_fp8_linear": _fake_linear,
    "cuda_fp8_linear.inference": _fake_linear,
    "cuda_fp8_experts_linear": _fake_experts_linear,
    "cuda_fp8_dequantize": _fake_dequantize,
    "cpu_fp8_round_tokens": _fake_round_tokens,
    "cpu_fp8_linear": _fake_cpu_linear,
    "cpu_fp8_linear.inference": _fake_cpu_linear,
    "cpu_fp8_linear_dequantized": _fake_cpu_linear,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"hfq::{_name}", _fake, lib=LIBRARY)


for _name in ("fp8_linear", "fp8_scaled_linear", "fp8_widened_linear", "cuda_fp8_linear"):
    register_gradient(_name, 3, gradient_of_bytes(torch.ops.hfq.fp8_dequantize))


def _cpu_product(grad: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
    qweight, scales, codebook, _ = operands
    columns, rows = sizes
    return rows16_product(grad, (qweight, scales, None, codebook), (8, columns, columns, rows))


for _name in ("cpu_fp8_linear", "cpu_fp8_linear_dequantized"):
    register_gradient(_name, 4, _cpu_product)
