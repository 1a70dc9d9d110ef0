"""Products with 8-bit floats in PyTorch: what every kernel must compute, and the one on the tensor cores of a GPU.

    y[m, n] = sum over k of value(code[n, k]) * x[m, k]  *  scale[n]  + bias[n]

and, where activations are E4M3 as well (`hfq.core.activations`),

    y[m, n] = sum over k of value(code[n, k]) * value(x_code[m, k])  *  (token_scale[m] * scale[n])  + bias[n]

Products of two codes are exact in float32, which sums them up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.activations import quantize_tokens
from ..core.float8 import E4M3, e4m3_values
from . import cuda_machine

__all__ = ["TILE", "dequantize", "linear", "output", "product", "scaled_linear", "widened_linear"]

# `torch._scaled_mm` on CUDA takes multiples of so many rows and columns of the weight.
TILE = 16

# Rows are dequantized in pieces of about this many weights: on the CPU their values stay in the cache, elsewhere they
# take little memory.
_CHUNKS = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 24
# Dequantized weights, or float32 sums, that `widened_linear` has at a time.
_WIDENED = 1 << 25


def dequantize(qweight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight behind the bytes of E4M3.

    Args:
        qweight: uint8 `[..., N, K, 1]`.
        scales: float32 `[..., N, 1]`; None leaves them out.

    Returns:
        `[..., N, K]` in `dtype`, computed in float32.
    """
    codes = qweight.squeeze(-1)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, filled = codes.flatten(0, -2), out.view(-1, codes.shape[-1])
    factors = None if scales is None else scales.flatten(0, -2)
    for part in _pieces(rows):
        values = e4m3_values(rows[part])
        filled[part] = values if factors is None else values.mul_(factors[part])
    return out


def product(x: Tensor, qweight: Tensor, scales: Tensor | None) -> Tensor:
    """``x W^T`` in the dtype of x, which is that of the weight as well: `[M, K]` -> `[M, N]`.

    On the CPU in pieces whose values stay in the cache: a tensor for all of them costs several times as much to fill as a
    token's product (4096 x 4096, one token: 14 ms instead of 48).
    """
    if not x.is_cpu:
        return x @ dequantize(qweight, scales, x.dtype).T
    y = x.new_empty(len(x), len(qweight))
    for part in _pieces(qweight.squeeze(-1)):
        factors = None if scales is None else scales[part]
        y[:, part] = x @ dequantize(qweight[part], factors, x.dtype).T
    return y


def output(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Products `[M, N]`, with the bias added in their dtype, as the output `[..., N]` for x `[..., K]`, in that of x."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    # No view: autograd refuses to change one in place that an operator returned, and adapters do that.
    out: Tensor = torch.ops.aten._unsafe_view(y.to(x.dtype), (*x.shape[:-1], y.shape[-1]))
    return out


def _pieces(rows: Tensor) -> list[slice]:
    """Rows with about as many weights as suit the device."""
    chunk = _CHUNKS.get(rows.device.type, _CHUNK_ELSEWHERE)
    step = max(1, chunk // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def linear(
    x: Tensor, qweight: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``x W^T + bias`` with x rounded to E4M3.

    Args:
        x: `[..., K]` of any float dtype.
        qweight: uint8 `[N, K, 1]`.
        scales: float32 `[N, 1]`.
        input_scale: float32 `[1]` (static) or None (dynamic).
        bias: float `[N]` or None.

    Returns:
        `[..., N]` in x.dtype, computed in float32. A token with NaN or infinity gives NaN.
    """
    codes, token_scales = quantize_tokens(x.reshape(-1, x.shape[-1]), input_scale, E4M3)
    # Autocast would round the sums. The codes themselves are exact in whatever float32 products use.
    with torch.autocast(x.device.type, enabled=False):
        sums = product(e4m3_values(codes.view(torch.uint8)), qweight, None)
    return output(sums * (token_scales * scales.T), bias, x)


def scaled_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`linear` by PyTorch's product of 8-bit floats with a scale for each row of either side; N and K in whole `TILE`.

    It sums in float32 and rounds to bfloat16; the bias is added after that. Tokens are rounded by a native kernel where there
    is one.
    """
    if not x.numel():
        return linear(x, qweight, scales, input_scale, bias)
    codes, token_scales = _codes(x, input_scale)
    y = torch._scaled_mm(
        codes,
        qweight.squeeze(-1).view(E4M3).T,
        scale_a=token_scales.contiguous(),
        scale_b=scales.T.contiguous(),
        out_dtype=torch.bfloat16,
        # Fast accumulation keeps 14 bits of the sums.
        use_fast_accum=False,
    )
    return output(y.to(x.dtype), bias, x)


def widened_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`linear` by a product of bfloat16, which holds each E4M3, with float32 sums; some rows of W at a time.

    Tokens are rounded by a native kernel where there is one.
    """
    codes, token_scales = _codes(x, input_scale)
    tokens = codes.to(torch.bfloat16)
    y = x.new_empty((len(tokens), len(qweight)))
    step = max(1, _WIDENED // (TILE * max(1, *tokens.shape))) * TILE
    for first in range(0, len(qweight), step):
        part = slice(first, first + step)
        weight = qweight[part].squeeze(-1).view(E4M3).to(torch.bfloat16)
        sums = _float32_product(tokens, weight).mul_(token_scales * scales[part].T)
        y[:, part] = sums if bias is None else sums.add_(bias[part])
    return output(y, None, x)


def _codes(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens of `[..., K]`, rounded by a native kernel where there is one: E4M3 `[M, K]`, float32 `[M, 1]`."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    if tokens.dtype == torch.float64:
        # The rule reads activations as float32 whatever they are.
        tokens = tokens.float()
    if tokens.is_cuda and cuda_machine.reason() is not None:
        return quantize_tokens(tokens, input_scale, E4M3)
    codes, token_scales = torch.ops.hfq.cuda_fp8_quantize_tokens(tokens, input_scale)
    return codes, token_scales


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in float32, of bfloat16 `[M, K]` and `[N, K]`."""
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cpu:  # has no such product
            return x.float() @ weight.float().T
        return torch.mm(x, weight.T, out_dtype=torch.float32)
