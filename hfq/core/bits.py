"""Bit packing of unsigned codes, any width from 1 to 8 bits.

A row of codes is one little-endian bit stream: code k occupies the bits [k*bits, (k+1)*bits), counted from
the least significant bit of byte 0, and the last byte is padded with zeros.

    3 bits:  byte 0            byte 1            byte 2
             |c2 c2 c1 c1 c1 c0 c0 c0|  |c5 c4 c4 c4 c3 c3 c3 c2|  |c7 c7 c7 c6 c6 c6 c5 c5|
              7                     0    7                     0    7                     0
    4 bits:  byte j = code[2j] | code[2j+1] << 4

Operator, for which CUDA has a kernel: ``hfq::pack_codes(codes uint8 [..., K], bits) -> uint8 [..., B]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack", "pack_codes", "packed_bytes", "unpack"]

_LIBRARY: Any = torch.library.Library("hfq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("pack_codes(Tensor codes, int bits) -> Tensor")


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of one packed row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[..., K]`, each below 2**bits, into contiguous uint8 `[..., ceil(K * bits / 8)]`.

    8 bits are what they are: the result may be the codes themselves. So it is in `unpack`.
    """
    if bits == 8:
        return codes.contiguous()
    packed: Tensor = torch.ops.hfq.pack_codes(codes, bits)
    return packed


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """`pack` of fewer than 8 bits."""
    unit_codes, unit_bytes = _unit(bits)
    units = _in_units(codes, unit_codes)
    packed = units.new_zeros((*units.shape[:-1], unit_bytes))
    for i in range(unit_codes):
        byte, shift = divmod(i * bits, 8)
        # Shifts of uint8 drop what leaves the byte.
        packed[..., byte] |= units[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= units[..., i] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_bytes(codes.shape[-1], bits)].contiguous()


_LIBRARY.impl("pack_codes", pack_codes, "CompositeExplicitAutograd")


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 `[..., ceil(count * bits / 8)]` -> uint8 codes `[..., count]`."""
    if bits == 8:
        return packed[..., :count]
    unit_codes, unit_bytes = _unit(bits)
    units = _in_units(packed, unit_bytes)
    mask = (1 << bits) - 1
    codes = []
    for i in range(unit_codes):
        byte, shift = divmod(i * bits, 8)
        code = units[..., byte] >> shift
        if shift + bits > 8:
            code |= units[..., byte + 1] << (8 - shift)
        codes.append(code & mask)
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]


def _unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that fills whole bytes: 3 bits have 8 codes in 3 bytes."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def _in_units(values: Tensor, size: int) -> Tensor:
    """Cut the last dimension into runs of `size`, filled up with zeros: `[..., K]` -> `[..., U, size]`."""
    missing = -values.shape[-1] % size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size)
