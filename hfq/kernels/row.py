"""What a kernel is to the rest of hfq: the problem it is asked about, and the row it fills in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.weight import PackedGrid

__all__ = ["KernelRow", "Problem"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that a kernel needs to know before it takes a weight."""

    device: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    has_codebook: bool
    has_g_idx: bool
    activation: str | None

    @classmethod
    def of(cls, grid: PackedGrid) -> Problem:
        return cls(
            device=grid.qweight.device.type,
            bits=grid.bits,
            group_size=grid.group_size,
            in_features=grid.in_features,
            out_features=grid.out_features,
            has_codebook=grid.codebook is not None,
            has_g_idx=grid.g_idx is not None,
            activation=grid.activation,
        )


class KernelRow(Protocol):
    """One way to multiply with a packed weight."""

    name: str

    def reject(self, problem: Problem) -> str | None:
        """Why this kernel cannot take the problem, or None."""

    def prepare(self, tensor: Tensor) -> Tensor:
        """Turn one neutral tensor (codes, scales or zero points) into the kernel's layout."""

    def restore(self, tensor: Tensor, out_features: int, row_bytes: int) -> Tensor:
        """The inverse of `prepare`, bit-exact. `row_bytes`: packed bytes of a row of codes."""

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        """``x W^T + bias``: x `[..., K]` -> `[..., N]` in x.dtype. `grid` is in the kernel's layout.

        Where ``grid.activation`` is set, x is quantized to int8 whatever `int8_activations` says.
        """

    def rows(self, grid: PackedGrid, index: Tensor) -> PackedGrid:
        """The rows `index` (int64 `[T]`) of a grid in the kernel's layout, as a neutral grid `[T, ...]`."""

    def dequantize(self, grid: PackedGrid, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]` behind a grid in the kernel's layout."""
