"""Operators that pack weights on CUDA.

    cuda_group_range    weight [N, K] -> float32 [N, G], float32 [N, G]      native on CUDA; the rule of hfq.core.affine, to the bit
    cuda_nearest_codes  weight [N, K], a grid -> uint8 [N, K]                native on CUDA; likewise
    cuda_pack_codes     codes uint8 [N, K] -> uint8 [N, B]                   native on CUDA; that of hfq.core.bits
    cuda_to_fragments   neutral uint8 [N, B, 1] -> [N16, C, 32 | 48, 16]     native on CUDA; hfq.kernels.fragments says what that is

Importing this module lets `hfq::group_range`, `hfq::nearest_codes` and `hfq::pack_codes` of `hfq.core` take them where they run. What PyTorch's
operators do there is a launch for each step, 66 for a slice of a weight, which the processor takes longer for than the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import affine
from ..core.bits import pack_codes, packed_bytes
from ..core.spec import group_count
from . import cuda_machine, fragments
from .ops import LIBRARY

__all__ = ["takes", "to_fragments"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

for _schema in (
    "cuda_group_range(Tensor weight, int group_size) -> (Tensor, Tensor)",
    "cuda_nearest_codes(Tensor weight, Tensor scales, Tensor? zeros, Tensor? codebook, int bits, int group_size) -> Tensor",
    "cuda_pack_codes(Tensor codes, int bits) -> Tensor",
    "cuda_to_fragments(Tensor qweight, int bits, bool halves) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))

LIBRARY.impl("cuda_group_range", affine.group_range, "CompositeExplicitAutograd")
LIBRARY.impl("cuda_nearest_codes", affine.nearest_codes, "CompositeExplicitAutograd")
LIBRARY.impl("cuda_pack_codes", pack_codes, "CompositeExplicitAutograd")
LIBRARY.impl("cuda_to_fragments", fragments.to_fragments, "CompositeExplicitAutograd")


def to_fragments(neutral: Tensor, bits: int, halves: bool = False) -> Tensor:
    """`fragments.to_fragments`, by a kernel where one runs."""
    if neutral.dtype != torch.uint8 or not _is_native(neutral):
        return fragments.to_fragments(neutral, bits, halves)
    rows, size, _ = neutral.shape[-3:]
    # A stack is one matrix if tiles end where its weights do.
    size_of_one = rows if rows % fragments.ROWS else neutral.numel()
    matrices = torch.split(neutral.reshape(-1, size, 1).contiguous(), size_of_one)
    tiles = [torch.ops.hfq.cuda_to_fragments(matrix, bits, halves) for matrix in matrices]
    all_tiles = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
    return all_tiles.view(fragments.tiles_shape(neutral.shape, bits))


def takes(weight: Tensor) -> bool:
    """Whether there are kernels for this weight, which read it in its own dtype."""
    return weight.dtype in _FLOATS and _is_native(weight)


def _is_native(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.numel() > 0 and cuda_machine.reason() is None


def _group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    if not takes(weight):
        return affine.group_range(weight, group_size)
    size = _columns(weight, group_size)
    found: tuple[Tensor, Tensor] = torch.ops.hfq.cuda_group_range(weight.contiguous(), size)
    return found


def _nearest_codes(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    points: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    if not takes(weight):
        return affine.nearest_codes(weight, scales, zeros, points, bits, group_size)
    grid = (scales.contiguous(), None if zeros is None else zeros.contiguous(), points)
    codes: Tensor = torch.ops.hfq.cuda_nearest_codes(
        weight.contiguous(), *grid, bits, _columns(weight, group_size)
    )
    return codes


def _columns(weight: Tensor, group_size: int) -> int:
    """Of a group; -1 stands for all."""
    return weight.shape[1] if group_size == -1 else group_size


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    if not _is_native(codes):
        return pack_codes(codes, bits)
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    packed: Tensor = torch.ops.hfq.cuda_pack_codes(rows, bits)
    return packed.view(*codes.shape[:-1], packed.shape[1])


LIBRARY.impl("group_range", _group_range, "CUDA")
LIBRARY.impl("nearest_codes", _nearest_codes, "CUDA")
LIBRARY.impl("pack_codes", _pack_codes, "CUDA")


def _fake_group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], group_count(weight.shape[1], group_size))
    low = weight.new_empty(shape, dtype=torch.float32)
    return low, torch.empty_like(low)


def _fake_nearest_codes(weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.uint8)


def _fake_pack_codes(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.shape[0], packed_bytes(codes.shape[1], bits)))


def _fake_to_fragments(qweight: Tensor, bits: int, halves: bool) -> Tensor:
    return qweight.new_empty(fragments.tiles_shape(qweight.shape, bits))


torch.library.register_fake("hfq::cuda_group_range", _fake_group_range, lib=LIBRARY)
torch.library.register_fake("hfq::cuda_nearest_codes", _fake_nearest_codes, lib=LIBRARY)
torch.library.register_fake("hfq::cuda_pack_codes", _fake_pack_codes, lib=LIBRARY)
torch.library.register_fake("hfq::cuda_to_fragments", _fake_to_fragments, lib=LIBRARY)
