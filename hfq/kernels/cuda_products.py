"""What the operators on CUDA layouts have in common, whatever their operands: products with some rows of a dequantized weight at a
time, shapes and gradients.

A layout with the prefix ``cuda`` has the operators ``hfq::cuda_dequantize``, ``_lookup``, ``_linear`` with its overload for inference,
``_linear_dequantized`` and ``_linear_gradient``; sizes end with in_features and out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .ops import LIBRARY, matmul, register_gradient, register_second_gradient, widened

__all__ = [
    "CHUNK",
    "experts_by_parts",
    "fake_linear",
    "gradient_by_parts",
    "gradient_of_bytes",
    "linear_by_parts",
    "register_shapes_and_gradients",
]

# Bytes of a dequantized weight that are there at a time.
CHUNK = 128 << 20

# Runs of rows of a weight, dequantized.
_Parts = Iterable[tuple[slice, Tensor]]


def linear_by_parts(x: Tensor, parts: _Parts, bias: Tensor | None, out_features: int) -> Tensor:
    """``x W^T + bias``: x `[..., K]` -> `[..., N]`."""
    y = x.new_empty((*x.shape[:-1], out_features))
    for part, weight in parts:
        product = matmul(x, weight, None if bias is None else bias[part])
        if len(weight) == out_features:
            return product
        y[..., part] = product
    return y


def gradient_by_parts(grad: Tensor, parts: _Parts, in_features: int, out_features: int) -> Tensor:
    """``grad W``: grad `[..., N]` -> `[..., K]`."""
    total = None
    for part, weight in parts:
        product = matmul(grad[..., part], weight.T, None)
        if len(weight) == out_features:
            return product
        # Each product is rounded to the dtype of grad once; their sum is not rounded on the way.
        wide = product.float() if product.dtype.itemsize == 2 else product
        total = wide if total is None else total.add_(wide)
    if total is None:
        return grad.new_zeros((*grad.shape[:-1], in_features))
    return total.to(grad.dtype)


def gradient_of_bytes(
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor],
) -> Callable[..., Tensor]:
    """A product for `register_gradient` of rows of 8-bit codes, some of which are dequantized at a time.

    Args:
        dequantize: (qweight `[n, ...]`, scales `[n, 1]`, dtype) -> `[n, K]`.
    """

    def product(grad: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
        qweight, scales, _ = operands
        out_features, in_features = len(qweight), qweight.shape[1:].numel()
        wide = widened(grad) if grad.is_cpu else grad
        step = max(1, CHUNK // max(1, in_features * wide.dtype.itemsize))
        slices = (slice(first, first + step) for first in range(0, out_features, step))
        parts = ((part, dequantize(qweight[part], scales[part], wide.dtype)) for part in slices)
        return gradient_by_parts(wide, parts, in_features, out_features).to(grad.dtype)

    return product


def experts_by_parts(
    x: Tensor, counts: Tensor, out_features: int, linear: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """``linear(tokens, expert)`` of the first ``counts[0]`` rows of x, the next ones, ...; zeros behind them: `[M, N]`."""
    y = x.new_zeros((x.shape[0], out_features))
    first = 0
    for expert, count in enumerate(counts.tolist()):
        tokens = slice(first, first + count)
        first += count
        y[tokens] = linear(x[tokens], expert)
    return y


def _fake_dequantize(qweight: Tensor, *rest: Any) -> Tensor:
    in_features, out_features, dtype = rest[-3:]
    return qweight.new_empty((out_features, in_features), dtype=dtype)


def _fake_lookup(index: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    in_features, _, dtype = rest[-3:]
    return qweight.new_empty((index.shape[0], in_features), dtype=dtype)


def fake_linear(x: Tensor, *rest: Any) -> Tensor:
    """The shape of a product; out_features stands last."""
    return x.new_empty((*x.shape[:-1], rest[-1]))


def _fake_linear_gradient(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], rest[-2]))


_FAKES: dict[str, Callable[..., Tensor]] = {
    "dequantize": _fake_dequantize,
    "lookup": _fake_lookup,
    "linear": fake_linear,
    "linear.inference": fake_linear,
    "linear_dequantized": fake_linear,
    "linear_gradient": _fake_linear_gradient,
}


def register_shapes_and_gradients(prefix: str, operand_count: int) -> None:
    """Fakes and gradients of the operators ``hfq::<prefix>_...``, which take so many packed tensors."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"hfq::{prefix}_{name}", fake, lib=LIBRARY)

    def product(grad: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
        operator = getattr(torch.ops.hfq, f"{prefix}_linear_gradient")
        y: Tensor = operator(grad, *operands, *sizes)
        return y

    def transposed(x: Tensor, operands: tuple[Any, ...], sizes: tuple[int, ...]) -> Tensor:
        operator = getattr(torch.ops.hfq, f"{prefix}_linear_dequantized")
        y: Tensor = operator(x, *operands, None, *sizes)
        return y

    for name in ("linear", "linear_dequantized"):
        register_gradient(f"{prefix}_{name}", operand_count, product)
    register_second_gradient(f"{prefix}_linear_gradient", transposed, operand_count)
