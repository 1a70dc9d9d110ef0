"""Layout ``rows16``: what the CPU kernels read. Neutral rows, padded and transposed in 32-bit words.

    neutral   codes  uint8 [..., N, B, 1]             rows16   uint8 [..., N16, W, 16, 4]
              scales float [..., N, G]                         float [..., N16, G, 16]

N16 = ceil(N / 16) blocks of 16 rows, W = ceil(B / 4) words per row. Word w of row ``16 * b + r`` stands at
``[b, w, r]``: one 64-byte line holds the same word of 16 rows, so a vector lane is a row.

    line (b, w):  | row 16b: bytes 4w .. 4w+3 | row 16b+1: bytes 4w .. 4w+3 | ... | row 16b+15 |

Padding is zero: codes of padded columns meet activations that count as zero, padded rows are not stored to.

3-bit codes are split into planes first, see `hfq.kernels.planes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import huge_pages, planes  # noqa: F401  (defines the operators)

__all__ = ["ROWS", "from_rows16", "pick_rows", "stack", "to_rows16"]

ROWS = 16
_WORD = 4  # bytes


def to_rows16(neutral: Tensor, split: bool = False) -> Tensor:
    """Codes (uint8 `[..., N, B, 1]`) or scales (float `[..., N, G]`) in layout rows16, in huge pages if large.

    Args:
        split: the codes have 3 bits, and their planes are wanted.
    """
    if neutral.dtype == torch.uint8:
        if split:
            neutral = _by_rows(torch.ops.hfq.split_planes, neutral)
        *lead, rows, size, _ = neutral.shape
        words = -(-size // _WORD)
        padded = _pad(neutral.reshape(*lead, rows, size), words * _WORD)
        lines = padded.reshape(*lead, -1, ROWS, words, _WORD).transpose(-3, -2)
    else:
        *lead, rows, groups = neutral.shape
        lines = _pad(neutral, groups).reshape(*lead, -1, ROWS, groups).transpose(-2, -1)
    if lines.device.type != "cpu":
        return lines.contiguous()
    out = huge_pages.empty(lines.shape, lines.dtype)
    unit = (
        torch.int32 if _in_words(lines) else lines.dtype
    )  # copying words is 10 times faster than bytes
    out.view(unit).copy_(lines.view(unit))
    return out


def from_rows16(lines: Tensor, shape: tuple[int, ...], split: bool = False) -> Tensor:
    """The inverse of `to_rows16`, bit-exact, to the neutral `shape` `[..., N, B, 1]` or `[..., N, G]`."""
    if lines.dtype == torch.uint8:
        *lead, blocks, words, _, _ = lines.shape
        rows = lines.transpose(-3, -2).reshape(*lead, blocks * ROWS, words * _WORD, 1)
        rows = rows[..., : shape[-3], :, :]
        if split:
            rows = _by_rows(torch.ops.hfq.join_planes, rows)
        return rows[..., : shape[-2], :].contiguous()
    *lead, blocks, groups, _ = lines.shape
    return (
        lines.transpose(-2, -1)
        .reshape(*lead, blocks * ROWS, groups)[..., : shape[-2], :]
        .contiguous()
    )


def pick_rows(lines: Tensor, index: Tensor, row_bytes: int) -> Tensor:
    """The rows `index` (int64 `[T]`) of codes `[N16, W, 16, 4]` in the neutral layout: uint8 `[T, row_bytes, 1]`."""
    words = lines[index // ROWS, :, index % ROWS]  # [T, W, 4]
    return words.flatten(-2).unsqueeze(-1)[:, :row_bytes]


def stack(tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Row blocks of several weights in one memory, and each weight's part of it."""
    counts = [len(tensor) for tensor in tensors]
    out = huge_pages.empty((sum(counts), *tensors[0].shape[1:]), tensors[0].dtype)
    torch.cat([tensor.detach() for tensor in tensors], out=out)
    return out, out.split_with_sizes(counts)


def _by_rows(convert: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """A conversion of `[N, B]` for `[..., N, B, 1]`."""
    rows = convert(codes.flatten(0, -3).squeeze(-1).contiguous())
    return rows.view(*codes.shape[:-2], rows.shape[1], 1)


def _pad(rows: Tensor, columns: int) -> Tensor:
    """Zeros below and to the right: `[..., N, C]` -> `[..., 16 * N16, columns]`."""
    missing = (columns - rows.shape[-1], -rows.shape[-2] % ROWS)
    if missing == (0, 0):
        return rows
    return torch.nn.functional.pad(rows, (0, missing[0], 0, missing[1]))


def _in_words(lines: Tensor) -> bool:
    """Whether codes can be read as aligned 32-bit words (a tensor in a mapped file may start anywhere)."""
    if lines.dtype != torch.uint8 or lines.data_ptr() % _WORD or lines.storage_offset() % _WORD:
        return False
    return lines.stride(-1) == 1 and all(stride % _WORD == 0 for stride in lines.stride()[:-1])
