"""From a float weight to packed tensors, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import WeightError
from ..core.weight import QuantizedWeight
from ..formats import FORMATS, GROUP_INDEX, INPUT_SCALE, ROW_CHUNK
from ..kernels import cuda_packing_ops, native
from .slot import PackedSlot

__all__ = ["Encode", "pack_weight"]

# Quantizes rows [n, K] of one weight: float32, but on a GPU with our kernels float16 and bfloat16, too.
Encode = Callable[[Tensor], QuantizedWeight]

# Weights per slice. On the CPU the float32 intermediates of a slice stay in cache. Elsewhere a slice is 25 to 70 launches (12 to
# 44 with our kernels) of 5 to 20 us and two answers that are waited for, in which a disk reads some MB: the weights of a slice
# have 16, or 64 with our kernels, with which `rtn` takes 6 bytes per weight meanwhile, 180 MB, and without 10. (Searches go
# through slices of their own.)
_SLICE = 1 << 20
_SLICE_ELSEWHERE = 1 << 23
_SLICE_NATIVE = 1 << 25


@torch.no_grad()
def pack_weight(weight: Tensor, slot: PackedSlot, encode: Encode) -> dict[str, Tensor]:
    """Quantize and pack `[N, K]` (or a stack `[E, N, K]`) for `slot`.

    Args:
        weight: any float dtype, on any device; read, never written.
        encode: quantizes a slice of rows; see `hfq.algorithms`.

    Returns:
        Stored tensors by key ("weight", "weight_scale", ...) on the weight's device; all but the scale of static
        activations, which no weight tells.

    Raises:
        WeightError: wrong shape, or what `encode` raises.
    """
    if tuple(weight.shape) != slot.float_shape:
        raise WeightError(
            f"expected a weight of shape {slot.float_shape}, got {tuple(weight.shape)}"
        )
    native.load()  # codes are chosen by its code, too
    out = {
        key: torch.empty(layout.shape, dtype=layout.dtype, device=weight.device)
        for key, layout in slot.layout().items()
        if key != INPUT_SCALE
    }
    if slot.experts is None:
        _pack_rows(weight, out, slot, encode)
    else:
        for index, expert in enumerate(weight):
            _pack_rows(expert, {key: tensor[index] for key, tensor in out.items()}, slot, encode)
    return out


def _pack_rows(weight: Tensor, out: dict[str, Tensor], slot: PackedSlot, encode: Encode) -> None:
    packed_format = FORMATS.get(slot.format)
    rows, columns = weight.shape
    native_rows = cuda_packing_ops.takes(weight)
    size = _SLICE_NATIVE if native_rows else _SLICE if weight.is_cpu else _SLICE_ELSEWHERE
    step = max(1, size // (columns * ROW_CHUNK)) * ROW_CHUNK
    position = dict.fromkeys(out, 0)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        packed = packed_format.pack(encode(part.contiguous() if native_rows else part.float()))
        for key, tensor in packed.items():
            if key == GROUP_INDEX:
                out[key].copy_(tensor)
                continue
            end = position[key] + tensor.shape[0]
            out[key][position[key] : end] = tensor
            position[key] = end
