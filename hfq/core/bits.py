"""Bit packing of unsigned codes, any width from 1 to 8 bits.

A row of codes is one little-endian bit stream: code k occupies the bits [k*bits, (k+1)*bits), counted from
the least significant bit of byte 0, and the last byte is padded with zeros.

    3 bits:  byte 0            byte 1            byte 2
             |c2 c2 c1 c1 c1 c0 c0 c0|  |c5 c4 c4 c4 c3 c3 c3 c2|  |c7 c7 c7 c6 c6 c6 c5 c5|
              7                     0    7                     0    7                     0
    4 bits:  byte j = code[2j] | code[2j+1] << 4
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of one packed row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[..., K]`, each below 2**bits, into uint8 `[..., ceil(K * bits / 8)]`."""
    count = codes.shape[-1]
    if bits == 8:
        return codes.contiguous()
    per_unit, unit_bytes = _unit(bits)
    padded = torch.nn.functional.pad(codes, (0, -count % per_unit)).unflatten(-1, (-1, per_unit))
    if unit_bytes == 1:
        packed = padded[..., 0].clone()
        for i in range(1, per_unit):
            packed |= padded[..., i] << (i * bits)
    else:
        # Odd widths: 8 codes fill `bits` bytes exactly; one 64-bit word holds them (at most 56 bits).
        word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=codes.device)
        for i in range(per_unit):
            word |= padded[..., i].to(torch.int64) << (i * bits)
        packed = torch.stack([(word >> (8 * b)) & 0xFF for b in range(unit_bytes)], dim=-1)
        packed = packed.to(torch.uint8).flatten(-2)
    return packed[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 `[..., ceil(count * bits / 8)]` -> uint8 codes `[..., count]`."""
    if bits == 8:
        return packed[..., :count]
    per_unit, unit_bytes = _unit(bits)
    if unit_bytes == 1:
        mask = (1 << bits) - 1
        codes = torch.stack([(packed >> (i * bits)) & mask for i in range(per_unit)], dim=-1)
        return codes.flatten(-2)[..., :count]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % unit_bytes))
    unit = padded.unflatten(-1, (-1, unit_bytes)).to(torch.int64)
    word = unit[..., 0].clone()
    for b in range(1, unit_bytes):
        word |= unit[..., b] << (8 * b)
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> (i * bits)) & mask for i in range(per_unit)], dim=-1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that fills whole bytes."""
    return (8 // bits, 1) if bits in (1, 2, 4) else (8, bits)
