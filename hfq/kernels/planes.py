"""3-bit codes in planes: what CPU kernels can unpack with a shift and a mask.

In the stored layout (`hfq.core.bits`) some of them lie across two bytes. 32 columns, 12 bytes, become three 32-bit words:
two with the lower two bits of 16 codes each, column k in the bits 2k and 2k + 1, and one in which the upper bit of column
``16 * h + 4 * b + j`` is bit ``4 * h + j`` of byte b:

    word 0, 1   | c3 c3 c2 c2 c1 c1 c0 c0 | c7 c7 ...           four codes to a byte
    word 2      | c19 c18 c17 c16 c3 c2 c1 c0 | c23 ... c4 |    upper bits; so a shift brings four of them below those of a quad

    split_planes   uint8 [N, B] -> [N, 12 * ceil(B / 12)]   PyTorch reference, native on the CPU
    join_planes    uint8 [N, 12 U] -> [N, 12 U]             the inverse, up to the padding
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.bits import pack, unpack

__all__ = ["join_planes", "split_planes"]

_BITS, _LOWER = 3, 2
_COLUMNS, _BYTES = 32, 12  # of a unit
_LOWER_BYTES = _COLUMNS * _LOWER // 8

_LIBRARY: Any = torch.library.Library("hfq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("split_planes(Tensor codes) -> Tensor")
_LIBRARY.define("join_planes(Tensor planes) -> Tensor")


def split_planes(codes: Tensor) -> Tensor:
    """Rows of packed 3-bit codes, uint8 `[N, B]`, as planes; the last unit is filled up with zeros."""
    rows, size = codes.shape
    units = -(-size // _BYTES)
    whole = torch.nn.functional.pad(codes, (0, units * _BYTES - size))
    unpacked = unpack(whole, _BITS, units * _COLUMNS)
    upper = (unpacked >> _LOWER).view(rows, units, 2, 4, 4).transpose(2, 3).flatten(1)
    planes = (pack(unpacked & 3, _LOWER), pack(upper, 1))
    words = [
        plane.view(rows, units, size)
        for plane, size in zip(planes, (_LOWER_BYTES, _BYTES - _LOWER_BYTES), strict=True)
    ]
    return torch.cat(words, dim=-1).flatten(1)


def join_planes(planes: Tensor) -> Tensor:
    """The inverse of `split_planes`."""
    rows, size = planes.shape
    units = size // _BYTES
    words = planes.view(rows, units, _BYTES)
    lower = unpack(words[..., :_LOWER_BYTES].flatten(1), _LOWER, units * _COLUMNS)
    upper = unpack(words[..., _LOWER_BYTES:].flatten(1), 1, units * _COLUMNS)
    upper = upper.view(rows, units, 4, 2, 4).transpose(2, 3).flatten(1)
    return pack(lower | upper << _LOWER, _BITS)


_LIBRARY.impl("split_planes", split_planes, "CompositeExplicitAutograd")
_LIBRARY.impl("join_planes", join_planes, "CompositeExplicitAutograd")


def _fake(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], -(-codes.shape[1] // _BYTES) * _BYTES))


for _name in ("split_planes", "join_planes"):
    torch.library.register_fake(f"hfq::{_name}", _fake, lib=_LIBRARY)
