"""What the operators on CUDA layouts have in common, whatever their operands: shapes and gradients.

A layout with the prefix ``cuda`` has the operators ``hfq::cuda_dequantize``, ``_lookup``, ``_linear`` with its overload for inference,
``_linear_dequantized`` and ``_linear_gradient``; sizes end with in_features and out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import LIBRARY, register_gradient, register_second_gradient

__all__ = [
    "fake_linear",
    "register_shapes_and_gradients",
]


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
