"""Products with dense weights, of which some rows are there at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CHUNK",
    "experts_by_parts",
    "gradient_by_parts",
    "gradient_of_bytes",
    "linear_by_parts",
    "matmul",
    "native_dtype",
    "widened",
]

# Bytes of a dequantized weight that are there at a time.
CHUNK = 128 << 20

# Runs of rows of a weight, dequantized.
_Parts = Iterable[tuple[slice, Tensor]]


def native_dtype(dtype: torch.dtype) -> torch.dtype:
    """What native code writes for it: float32 and narrower; float64 is a float32 weight, widened."""
    return torch.float32 if dtype == torch.float64 else dtype


def _slow_dtypes() -> frozenset[torch.dtype]:
    """16-bit dtypes that the matrix library multiplies 4 to 10 times as slowly as float32: those without instructions."""
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return frozenset()
    needed = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}
    return frozenset(dtype for dtype, feature in needed.items() if not found.get(feature))


# A constant, not a cached function: compilers trace what asks for it.
_SLOW_DTYPES = _slow_dtypes()


def widened(x: Tensor) -> Tensor:
    """x, on the CPU, as the matrix library multiplies it fast."""
    return x.float() if x.dtype in _SLOW_DTYPES else x


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` in the dtype of x, whatever autocast says: x `[..., K]` and W `[N, K]` of one dtype."""
    bias = None if bias is None else bias.to(x.dtype)
    tokens = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        # Autocast would choose the dtype of the product; the schema's fake promises that of x.
        with torch.autocast(x.device.type, enabled=False):
            y = torch.nn.functional.linear(tokens, weight, bias)
    else:
        y = torch.nn.functional.linear(tokens, weight, bias)
    # No view: autograd refuses to change one in place that an operator returned, and adapters do that.
    out: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
    return out


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
