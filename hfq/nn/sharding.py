"""Parameters of which each process holds a part, as `torch.distributed.fsdp.fully_shard` (FSDP2) makes them.

What is sharded is whatever the module held: codes in the layout of a kernel, scales as integers. Before a module's forward
the parts are gathered into one Parameter, the same one each time, whose memory goes again afterwards.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

__all__ = ["is_sharded", "sendable", "shard_like", "whole"]


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. (Its module takes longer to import than hfq, and nobody has a DTensor without it.)"""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts. All processes have to ask for it."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    # Bytes, in a dimension of their own: neither NCCL nor Gloo sends integers of 16 bits.
    local = tensor.to_local().contiguous().unsqueeze(-1).view(torch.uint8)
    shape = torch.Size((*tensor.shape, tensor.itemsize))
    parts = DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return parts.full_tensor().view(tensor.dtype).squeeze(-1)


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have, of which each then holds the part that it holds of `other`.

    Of 16-bit integers, and floats held as such, each keeps the whole: `full_tensor` could not send the integers.
    """
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.dtype == torch.int16:
        return everywhere
    return everywhere.redistribute(placements=other.placements)


def sendable(tensor: Tensor) -> Tensor:
    """The tensor, or what `shard_like` makes of it."""
    return shard_like(whole(tensor), tensor) if tensor.dtype == torch.int16 else tensor
