"""What every kernel must compute, in plain PyTorch. Slow, exact, and right on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import bits as bit_packing
from ..core.bilevel import decode_bilevel
from ..core.spec import group_count
from ..core.weight import ScaleCodes, expand_groups

__all__ = ["dequantize", "spqr_dequantize"]

# Rows are dequantized in pieces of about this many weights, so that the float32 steps in between stay in cache.
_CHUNK = 1 << 20


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight behind packed codes in the neutral layout.

    Args:
        qweight: uint8 `[..., N, B, 1]`.
        scales, zeros: float `[..., N, G]`.
        codebook: float32 `[2**bits]` or None for integers.
        g_idx: int32 `[K]` or None.
        group_size: columns per group (K for one group per row).

    Returns:
        `[..., N, K]` in `dtype`, computed in float32.
    """
    out = torch.empty((*qweight.shape[:-2], in_features), dtype=dtype, device=qweight.device)
    rows, filled = qweight.flatten(0, -3).squeeze(-1), out.view(-1, in_features)
    scales = scales.flatten(0, -2)
    zeros = None if zeros is None else zeros.flatten(0, -2)
    step = max(1, _CHUNK // in_features)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        codes = bit_packing.unpack(rows[part], bits, in_features)
        if codebook is not None:
            values = codebook[codes.int()]
        elif zeros is None:
            values = codes.float() - (1 << (bits - 1))
        else:
            values = codes.float() - expand_groups(
                zeros[part].float(), group_size, in_features, g_idx
            )
        filled[part] = values * expand_groups(scales[part].float(), group_size, in_features, g_idx)
    return out


def spqr_dequantize(
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
    dtype: torch.dtype,
) -> Tensor:
    """The weight behind packed tensors of format ``spqr`` in the neutral layout.

    Args:
        qweight: uint8 `[N, B, 1]`.
        stat_codes: uint8 `[N, S, 1]`.
        stats: float `[ceil(N / stat_group_size), G, 4]`.
        offsets: int32 `[N + 1]`.
        columns, values: integers and floats `[Z]`.
        group_size: columns per group (K for one group per row).

    Returns:
        `[N, K]` in `dtype`, computed in float32.
    """
    codes = bit_packing.unpack(
        stat_codes.squeeze(-1), stat_bits, 2 * group_count(in_features, group_size)
    )
    grid = []
    for first in (0, 1):
        step, offset = stats[..., 2 * first], stats[..., 2 * first + 1]
        stored = ScaleCodes(codes=codes[:, first::2], step=step, offset=offset)
        grid.append(expand_groups(decode_bilevel(stored, stat_group_size), group_size, in_features))
    scales, zeros = grid
    out = (bit_packing.unpack(qweight.squeeze(-1), bits, in_features).float() - zeros) * scales
    rows = torch.arange(qweight.shape[0], device=qweight.device)
    rows = rows.repeat_interleave(offsets.diff().long(), output_size=columns.shape[0])
    out.index_put_((rows, columns.long()), values.float(), accumulate=True)
    return out.to(dtype)
