"""The tensors of one slot between two layouts: neutral, as a checkpoint stores them, and that of a kernel.

What a module holds ("held" below) is either, with floats as the integers of the same bits. Which one it is shows
in the number of dimensions: a kernel's layout has more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.spec import SpqrSpec
from ..core.weight import Grid, SpqrGrid
from ..formats import FORMATS
from ..kernels.row import KernelRow, StatLayout
from .slot import PackedSlot

__all__ = [
    "as_bits",
    "as_float",
    "in_kernel_layout",
    "kernel_grid",
    "neutral_grid",
    "show_to_kernels",
    "to_kernel",
    "to_neutral",
    "wait_for_streams",
]

# The operand whose codes are not of ``spec.bits`` bits.
_STATS = "stat_codes"
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def as_bits(tensor: Tensor) -> Tensor:
    """A float tensor as the integers of the same bits."""
    return tensor.view(_BITS[tensor.dtype]) if tensor.is_floating_point() else tensor


def as_float(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_bits`, for a tensor whose dtype in the layout is `dtype`."""
    return (
        tensor.view(dtype) if dtype.is_floating_point and not tensor.is_floating_point() else tensor
    )


def show_to_kernels(weight: Tensor) -> None:
    """Lets kernels see a weight that was just written.

    On CUDA a kernel may start while the one in front of it ends, and reads weights before it waits for that one
    (`kernels/cuda/launch.h`). Not so if any kernel lies between that does not overlap, as PyTorch's do not.
    """
    if weight.is_cuda:
        weight.new_ones(1)


def wait_for_streams(weight: Tensor) -> None:
    """Before memory of a weight is given away for a copy that nobody has asked for: streams may still read it, and nobody makes
    others wait for the new one.
    """
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


def in_kernel_layout(slot: PackedSlot, held: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is in a kernel's layout."""
    layout = slot.layout()
    return any(tensor.dim() != len(layout[key].shape) for key, tensor in held.items())


def neutral_grid(slot: PackedSlot, held: Mapping[str, Tensor]) -> Grid:
    """The operands behind tensors in the neutral layout."""
    layout = slot.layout()
    tensors = {key: as_float(tensor, layout[key].dtype) for key, tensor in held.items()}
    return FORMATS.get(slot.format).grid(tensors, slot.spec, slot.out_features, slot.in_features)


def to_kernel(
    grid: Grid, held: Mapping[str, Tensor], row: KernelRow[Any]
) -> tuple[Grid, dict[str, Tensor]]:
    """Operands in the layout of `row`, and the tensors to hold from now on: one copy in memory.

    Args:
        grid: `neutral_grid` of `held`.
    """
    operands: dict[str, Any] = {}
    prepared = dict(held)
    for key, field in grid.OPERANDS.items():
        operand = getattr(grid, field)
        if operand is None:
            continue
        if isinstance(grid, SpqrGrid) and field == _STATS and isinstance(row, StatLayout):
            operands[field] = row.prepare_stats(operand, grid.stat_bits)
        else:
            operands[field] = row.prepare(operand, grid.bits)
        # Decoded operands (double-quantized scales) are extra; all others live in what is held.
        if operand.data_ptr() == held[key].data_ptr():
            prepared[key] = as_bits(operands[field])
    show_to_kernels(next(iter(held.values())))
    return _constant(replace(grid, **operands)), prepared


def kernel_grid(grid: Grid, held: Mapping[str, Tensor], row: KernelRow[Any]) -> Grid:
    """As `to_kernel`, of tensors that are in the layout of `row` already: operands are where they are, only what is decoded is extra."""
    decoded: dict[str, Any] = {
        field: row.prepare(operand, grid.bits)
        for key, field in grid.OPERANDS.items()
        if (operand := getattr(grid, field)) is not None
        and operand.data_ptr() != held[key].data_ptr()
    }
    return _constant(replace(grid, **decoded))


def _constant(grid: Grid) -> Grid:
    """Compilers take the shapes and addresses of Parameters for constant, those of other tensors not."""
    frozen: dict[str, Any] = {
        name: nn.Parameter(value, requires_grad=False)
        for name, value in vars(grid).items()
        if isinstance(value, Tensor)
    }
    return replace(grid, **frozen)


def to_neutral(
    slot: PackedSlot, held: Mapping[str, Tensor], row: KernelRow[Any]
) -> dict[str, Tensor]:
    """The inverse of `to_kernel`, bit-exact; tensors that are neutral already are handed through."""
    layout, spec = slot.layout(), slot.spec

    def restored(key: str, tensor: Tensor) -> Tensor:
        shape = layout[key].shape
        if tensor.dim() == len(shape):
            return tensor
        of_stats = SpqrGrid.OPERANDS.get(key) == _STATS
        if isinstance(spec, SpqrSpec) and of_stats and isinstance(row, StatLayout):
            return row.restore_stats(tensor, shape, spec.stat_bits)
        return row.restore(tensor, shape, spec.bits)

    return {key: restored(key, tensor) for key, tensor in held.items()}
