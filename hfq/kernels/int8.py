"""W8A8 in PyTorch: what every kernel with int8 activations must compute, and the product of integers on CUDA.

    y[m, n] = sum over k of (code[n, k] - 128) * x_code[m, k]  *  (token_scale[m] * scale[n])  + bias[n]

The sum is one of integers and exact, so that kernels agree with this up to the rounding of the last two steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.activations import quantize_tokens

__all__ = ["MAX_COLUMNS", "int8_linear", "integer_product", "scaled_sums"]

# 128 * 127 * 2^17 < 2^31: the sum over a row fits 32 bits.
MAX_COLUMNS = 1 << 17

# 128 * 127 * 1024 < 2^24: float32 holds all integers up to there. The factors are exact in bfloat16 and TF32, too, so
# that no setting of PyTorch for faster products of float32 changes a sum.
_EXACT_COLUMNS = 1024

# `torch._int_mm` on CUDA takes more than 16 rows, and multiples of 8 columns on either side.
_CUDA_ROWS, _CUDA_COLUMNS = 17, 8


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    """``x W^T + bias`` with x quantized to int8.

    Args:
        x: `[..., K]` of any float dtype.
        qweight: uint8 `[N, K, 1]`, codes from 0 to 255 with the zero point 128.
        scales: float `[N, 1]`.
        input_scale: float32 `[1]` (static) or None (dynamic); see `hfq.core.activations`.
        bias: float `[N]` or None.

    Returns:
        `[..., N]` in x.dtype, computed in float32. A token with NaN or infinity gives NaN.
    """
    codes, token_scales = quantize_tokens(x.reshape(-1, in_features), input_scale)
    # The zero point is the upper bit, so that without it codes are two's complement.
    weight = (qweight.squeeze(-1) ^ 128).view(torch.int8)
    y = scaled_sums(integer_product(codes, weight), token_scales, scales, bias)
    # No view: autograd refuses to change one in place that an operator returned, and adapters do that.
    shape = (*x.shape[:-1], qweight.shape[0])
    out: Tensor = torch.ops.aten._unsafe_view(y.to(x.dtype), shape)
    return out


def scaled_sums(sums: Tensor, token_scales: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 `[M, N]` from sums `[M, N]`, float32 token scales `[M, 1]`, scales `[N, 1]` and the bias `[N]`."""
    y = sums.float() * (token_scales * scales.float().T)
    return y if bias is None else y + bias.float()


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` of int8 `[M, K]` and `[N, K]`: the exact integers `[M, N]`."""
    if a.is_cuda and 0 < a.shape[1] <= MAX_COLUMNS and a.shape[0] and b.shape[0]:
        return _cuda_product(a, b)
    dtype = torch.int32 if a.shape[1] <= MAX_COLUMNS else torch.int64
    total = torch.zeros(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    # Autocast would round the sums.
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, a.shape[1], _EXACT_COLUMNS):
            part = slice(start, start + _EXACT_COLUMNS)
            total += (a[:, part].float() @ b[:, part].float().T).int()
    return total


def _cuda_product(a: Tensor, b: Tensor) -> Tensor:
    """`integer_product` on tensor cores, padded with zeros to what they take."""
    rows, columns = a.shape[0], b.shape[0]
    missing = -a.shape[1] % _CUDA_COLUMNS
    a = _padded(a, max(0, _CUDA_ROWS - rows), missing)
    b = _padded(b, -columns % _CUDA_COLUMNS, missing)
    return torch._int_mm(a.contiguous(), b.contiguous().T)[:rows, :columns]


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With so many rows and columns of zeros more. Not a copy where there are none, as that of `pad`."""
    if not rows and not columns:
        return matrix
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows))
