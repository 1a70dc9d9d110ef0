"""Layout ``fragments``: what the CUDA kernels read. Codes in the order in which tensor cores take them.

    neutral   codes  uint8 [..., N, B, 1]      fragments   uint8 [..., N16, C, 32 | 48, 16]
              scales float [..., N, G]                     float [..., N16, G, 8, 2]

N16 = ceil(N / 16) tiles of 16 rows, C blocks of columns. Row ``16 * tile + 8 * h + g`` is row (h, g) of its tile; its scale
stands at ``[tile, group, g, h]``. A block is what the 32 lanes of a warp load at once, lane ``4 * g + t`` 16 bytes (3 bits: 24,
the last 8 of all lanes behind the first 16 of all): rows g and g + 8 of some columns. They are cut into units of 32:

    column  32 * unit + 8 * t + 4 * j + 2 * q + e       register  r = 8 * unit + 4 * j + 2 * h + q, with two codes, e = 0, 1

    bits  block      32-bit words of a lane
    2     16 x 128   word r // 8: code e at bit 16 e + 2 (r % 8)
    3     16 x 128   word r // 5: code e at bit 16 e + 3 (r % 5); r = 30 + i: bit b of code e is bit 16 e + 15 of word 3 i + b
    4     16 x 64    word r // 4: code e at bit 16 e + 4 (r % 4)
    8     16 x 32    word r // 2: code e at bit 16 (r % 2) + 8 e

For format ``spqr`` the columns of a unit stand in another order, so that an instruction (j) takes 16 neighbouring ones:

    column  32 * unit + 16 * j + 4 * t + 2 * q + e       (``halves=True``)

``kernels/cuda/fragments.h`` says why. K is a multiple of 8; padding is zero: padded columns meet activations that count as zero,
padded rows are not stored to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.bits import pack, unpack

__all__ = ["BITS", "COLUMN_UNIT", "ROWS", "from_fragments", "stack", "tiles_shape", "to_fragments"]

BITS = (2, 3, 4, 8)
ROWS = 16  # of a tile
COLUMN_UNIT = 8  # of which K is a multiple

_UNIT = 32  # columns
_LANES = 32
# Weights that are converted at a time: each takes some 20 bytes meanwhile.
_CHUNK = 1 << 22


def to_fragments(neutral: Tensor, bits: int, halves: bool = False) -> Tensor:
    """Codes (uint8 `[..., N, B, 1]`) or scales (float `[..., N, G]`) in layout fragments.

    Args:
        halves: the order of columns for format ``spqr``.
    """
    if neutral.dtype != torch.uint8:
        *lead, rows, groups = neutral.shape
        padded = torch.nn.functional.pad(neutral, (0, 0, 0, -rows % ROWS))
        tiles = padded.view(*lead, -1, 2, ROWS // 2, groups).movedim(-1, -3).transpose(-1, -2)
        return tiles.clone(memory_format=torch.contiguous_format)
    rows, size, _ = neutral.shape[-3:]
    columns = size * 8 // bits
    blocks, units = -(-columns // _block_columns(bits)), _block_columns(bits) // _UNIT
    out = torch.empty(tiles_shape(neutral.shape, bits), dtype=torch.uint8, device=neutral.device)
    for matrix, tiles in zip(_matrices(neutral, 3), _matrices(out, 4), strict=True):
        for first, last in _chunks(rows, columns):
            codes = unpack(matrix[first:last, :, 0], bits, columns)
            missing = (blocks * units * _UNIT - columns, -codes.shape[0] % ROWS)
            codes = torch.nn.functional.pad(codes, (0, missing[0], 0, missing[1]))
            #            tile h g  block   unit   t  j  q  e
            codes = codes.view(-1, 2, 8, blocks, units, *((2, 4) if halves else (4, 2)), 2, 2)
            codes = codes.transpose(5, 6) if halves else codes
            registers = codes.permute(0, 3, 2, 5, 4, 6, 1, 7, 8)
            words = _words(registers.reshape(-1, blocks, _LANES, 8 * units, 2), bits)
            part = tiles[first // ROWS : -(-last // ROWS)]
            part.copy_(_bytes(words))
    return out


def tiles_shape(neutral: Sequence[int], bits: int) -> tuple[int, ...]:
    """That of the codes, for those of the neutral layout `[..., N, B, 1]`."""
    *lead, rows, size, _ = neutral
    blocks = -(-(size * 8 // bits) // _block_columns(bits))
    return (*lead, -(-rows // ROWS), blocks, 48 if bits == 3 else _LANES, 16)


def from_fragments(
    tiles: Tensor, shape: tuple[int, ...], bits: int, halves: bool = False
) -> Tensor:
    """The inverse of `to_fragments`, bit-exact, to the neutral `shape` `[..., N, B, 1]` or `[..., N, G]`."""
    if tiles.dtype != torch.uint8:
        rows = tiles.transpose(-1, -2).movedim(-3, -1).flatten(-4, -2)
        return rows[..., : shape[-2], :].contiguous()
    rows_count, size = shape[-3], shape[-2]
    columns = size * 8 // bits
    blocks, units = tiles.shape[-3], _block_columns(bits) // _UNIT
    out = torch.empty(shape, dtype=torch.uint8, device=tiles.device)
    for matrix, codes in zip(_matrices(out, 3), _matrices(tiles, 4), strict=True):
        for first, last in _chunks(rows_count, columns):
            words = _lanes(codes[first // ROWS : -(-last // ROWS)])
            registers = _registers(words, bits).view(-1, blocks, 8, 4, units, 2, 2, 2, 2)
            t_and_j = (5, 3) if halves else (3, 5)
            rows = registers.permute(0, 6, 2, 1, 4, *t_and_j, 7, 8)
            rows = rows.reshape(-1, blocks * units * _UNIT)
            matrix[first:last, :, 0] = pack(rows[: last - first, :columns], bits)
    return out


def stack(tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tiles of several weights in one memory, and each weight's part of it."""
    out = torch.cat([tensor.detach() for tensor in tensors])
    return out, out.split_with_sizes([len(tensor) for tensor in tensors])


def _matrices(tensor: Tensor, dims: int) -> Tensor:
    """`[..., *dims]` -> `[E, *dims]`."""
    return tensor.reshape(math.prod(tensor.shape[:-dims]), *tensor.shape[-dims:])


def _block_columns(bits: int) -> int:
    return 128 if bits == 3 else 256 // bits


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Runs of whole tiles, about `_CHUNK` weights each."""
    step = max(1, _CHUNK // max(1, columns) // ROWS) * ROWS
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _words(registers: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., R, 2]` -> the lane's words, int32 `[..., 4 | 6]`."""
    if bits == 8:
        return registers.flatten(-2).contiguous().view(torch.int32)
    pairs = registers[..., 0].int() | registers[..., 1].int() << 16
    spare = None
    if bits == 3:
        pairs, spare = pairs[..., :30], pairs[..., 30:]
    count = 5 if bits == 3 else 16 // bits
    fields = pairs.reshape(*pairs.shape[:-1], pairs.shape[-1] // count, count)
    words = fields[..., 0].clone()
    for field in range(1, fields.shape[-1]):
        words |= fields[..., field] << bits * field
    if spare is not None:
        for word in range(6):
            words[..., word] |= (spare[..., word // 3] >> word % 3 & 0x10001) << 15
    return words


def _registers(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`: uint8 `[..., R, 2]`."""
    if bits == 8:
        return words.contiguous().view(torch.uint8).view(*words.shape[:-1], 8, 2)
    mask, count = (1 << bits) - 1, 5 if bits == 3 else 16 // bits
    fields = torch.stack([words >> bits * field for field in range(count)], dim=-1).flatten(-2)
    if bits == 3:
        upper = words >> 15 & 0x10001
        spare = [
            upper[..., 3 * i] | upper[..., 3 * i + 1] << 1 | upper[..., 3 * i + 2] << 2
            for i in range(2)
        ]
        fields = torch.cat([fields, torch.stack(spare, dim=-1)], dim=-1)
    return torch.stack([fields & mask, fields >> 16 & mask], dim=-1).to(torch.uint8)


def _bytes(words: Tensor) -> Tensor:
    """Words of lanes `[T, C, 32, 4 | 6]` as they stand in memory: uint8 `[T, C, 32 | 48, 16]`."""
    parts = [words[..., :4], words[..., 4:]]
    flat = torch.cat([part.flatten(-2) for part in parts], dim=-1).contiguous()
    return flat.view(torch.uint8).view(*words.shape[:2], words.shape[-1] * 8, 16)


def _lanes(tiles: Tensor) -> Tensor:
    """The inverse of `_bytes`."""
    words = tiles.flatten(-2).contiguous().view(torch.int32)
    parts = [words[..., : 4 * _LANES], words[..., 4 * _LANES :]]
    by_lane = [part.reshape(*part.shape[:-1], _LANES, part.shape[-1] // _LANES) for part in parts]
    return torch.cat(by_lane, dim=-1)
