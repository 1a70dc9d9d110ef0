"""Codes of bilevel scales as the CUDA kernels of format ``spqr`` read them; weights have layout ``fragments`` (``halves=True``).

    neutral   uint8 [..., N, S, 1]          of each group the codes of scale and zero point, `stat_bits` each, a bit stream
    pairs     uint8 [..., N16, H, 8, 2]     stat_bits <= 4: row g: scale | zero << 4, row g + 8: likewise
              uint8 [..., N16, H, 8, 4]     else: scale and zero of row g, scale and zero of row g + 8

N16 = ceil(N / 16) tiles of 16 rows; H groups are what the bytes of a stored row have room for: G, or one more that is
zero. Fields of 4 or 8 bits cost a kernel one instruction each, those of 3 bits more; they make a weight of 3 bits in groups
of 16 columns 1/8 bit larger, in memory only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.bits import pack, unpack
from .fragments import ROWS

__all__ = ["from_stat_pairs", "stat_groups", "to_stat_pairs"]

_NARROW = 4


def stat_groups(row_bytes: int, stat_bits: int) -> int:
    """Groups that a stored row of so many bytes has room for."""
    return row_bytes * 8 // (2 * stat_bits)


def to_stat_pairs(neutral: Tensor, stat_bits: int) -> Tensor:
    """`[..., N, S, 1]` -> `[..., N16, H, 8, 2 | 4]`."""
    *lead, rows, size, _ = neutral.shape
    groups = stat_groups(size, stat_bits)
    codes = unpack(neutral.squeeze(-1), stat_bits, 2 * groups)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -rows % ROWS))
    # tile h g | group scale-or-zero -> tile group g h scale-or-zero
    codes = codes.view(*lead, -1, 2, ROWS // 2, groups, 2).movedim(-2, -4).transpose(-3, -2)
    if stat_bits > _NARROW:
        return codes.flatten(-2).contiguous()
    return (codes[..., 0] | codes[..., 1] << _NARROW).contiguous()


def from_stat_pairs(pairs: Tensor, shape: tuple[int, ...], stat_bits: int) -> Tensor:
    """The inverse of `to_stat_pairs`, bit-exact, to the neutral `shape`."""
    rows, size = shape[-3], shape[-2]
    if stat_bits <= _NARROW:
        codes = torch.stack([pairs & 15, pairs >> _NARROW], -1)
    else:
        codes = pairs.view(*pairs.shape[:-1], 2, 2)
    codes = codes.transpose(-3, -2).movedim(-4, -2)
    packed = pack(codes.flatten(-2).flatten(-4, -2)[..., :rows, :], stat_bits)
    missing = size - packed.shape[-1]
    return torch.nn.functional.pad(packed, (0, missing)).unsqueeze(-1).contiguous()
