"""What a kernel is to the rest of hfq: the problem it is asked about, and the row it fills in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ..core.weight import Fp8Grid, Grid, PackedGrid, SpqrGrid

__all__ = [
    "AllAtOnce",
    "AsStored",
    "KernelRow",
    "OneByOne",
    "Problem",
    "StatLayout",
    "each_expert",
    "stack_tiles",
]

# The one class of grids that a kernel reads.
G = TypeVar("G", PackedGrid, Fp8Grid, SpqrGrid)
# Those that rows of a weight are neighbours in.
Tiles = TypeVar("Tiles", PackedGrid, Fp8Grid)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that a kernel needs to know before it takes a weight.

    Attributes:
        kind: the class of the grid; kernels are asked about theirs only.
        stat_group_size: rows that share bilevel scales; 0 where there are none.
    """

    kind: type[Grid]
    device: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    has_codebook: bool
    has_g_idx: bool
    stat_group_size: int
    activation: str | None

    @classmethod
    def of(cls, grid: Grid) -> Problem:
        return cls(
            kind=type(grid),
            device=grid.qweight.device.type,
            bits=grid.bits,
            group_size=grid.group_size,
            in_features=grid.in_features,
            out_features=grid.out_features,
            has_codebook=getattr(grid, "codebook", None) is not None,
            has_g_idx=getattr(grid, "g_idx", None) is not None,
            stat_group_size=getattr(grid, "stat_group_size", 0),
            activation=getattr(grid, "activation", None),
        )


class KernelRow(Protocol[G]):
    """One way to multiply with a packed weight whose grids are of class G."""

    name: str

    def reject(self, problem: Problem) -> str | None:
        """Why this kernel cannot take the problem, or None."""

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        """Turn one neutral tensor (one of the operands of a grid with codes of so many bits) into the kernel's layout,
        or leave it as it is.
        """

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        """The inverse of `prepare`, bit-exact, for what it has changed. `shape`: of the neutral tensor."""

    def linear(self, x: Tensor, grid: G, bias: Tensor | None, int8_activations: bool) -> Tensor:
        """``x W^T + bias``: x `[..., K]` -> `[..., N]` in x.dtype. `grid` is in the kernel's layout.

        Where ``grid.activation`` is set, x is quantized as it says, whatever `int8_activations` says.
        """

    def experts(
        self, x: Tensor, counts: Tensor, grid: G, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        """`linear` with a stack of weights: the first ``counts[0]`` tokens meet weight 0, the next ones weight 1, ...

        Args:
            x: `[M, K]`.
            counts: int64 `[E]`, on the CPU or where x is; they add up to M.
            grid: every tensor has one more dimension in front, E.
            bias: `[E, N]`.
        """

    def reads_counts_on_device(self, x: Tensor, tokens: int, grid: G) -> bool:
        """Whether `experts`, called with so many tokens, leaves counts where they are: nobody waits for the device.

        They may then add up to less than M, and rows behind their sum become zeros.

        Args:
            x: whose device, dtype and gradient are those of the tokens.
            grid: as for `experts`.
        """

    def stack(self, grids: Sequence[G]) -> tuple[G, list[G]] | None:
        """One grid with the rows of all, in the kernel's layout, and the same grids as parts of its memory.

        Args:
            grids: of equal problems but for out_features.

        Returns:
            None where the kernel's layout has no such thing, or the grids differ otherwise.
        """

    def lookup(self, grid: G, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `index` (int `[T]`, from 0 to N - 1) of the weight: `[T, K]`."""

    def dequantize(self, grid: G, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]` behind a grid in the kernel's layout."""


@runtime_checkable
class StatLayout(Protocol):
    """A row that has a layout of its own for the codes of bilevel scales; others take `prepare` for them, too."""

    def prepare_stats(self, tensor: Tensor, stat_bits: int) -> Tensor:
        """``SpqrGrid.stat_codes``, uint8 `[..., N, S, 1]`, in the kernel's layout, which has more dimensions."""

    def restore_stats(self, tensor: Tensor, shape: tuple[int, ...], stat_bits: int) -> Tensor:
        """The inverse of `prepare_stats`, bit-exact."""


def each_expert(x: Tensor, counts: Tensor, linear: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``linear(tokens, expert)`` for each expert that has tokens, one after the other; see `KernelRow.experts`."""
    parts = x.split_with_sizes(counts.tolist())
    return torch.cat([linear(part, expert) for expert, part in enumerate(parts) if len(part)])


class OneByOne:
    """What `KernelRow` asks about several weights, for kernels that take one at a time."""

    def stack(self, grids: Sequence[Any]) -> tuple[Any, list[Any]] | None:
        return None

    def reads_counts_on_device(self, x: Tensor, tokens: int, grid: Any) -> bool:
        return False

    def experts(
        self: Any, x: Tensor, counts: Tensor, grid: Any, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        def linear(tokens: Tensor, expert: int) -> Tensor:
            own = None if bias is None else bias[expert]
            y: Tensor = self.linear(tokens, grid.expert(expert), own, int8_activations)
            return y

        return each_expert(x, counts, linear)


class AllAtOnce(OneByOne):
    """Kernels with one launch for all experts, which read the counts on the device."""

    def all_experts(self, x: Tensor, counts: Tensor, grid: Any, bias: Tensor | None) -> Tensor:
        """`KernelRow.experts` where `reads_counts_on_device` says so; x is contiguous, counts are where it is."""
        raise NotImplementedError

    def experts(
        self, x: Tensor, counts: Tensor, grid: Any, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        if self.reads_counts_on_device(x, x.shape[0], grid):
            return self.all_experts(x.contiguous(), counts.to(x.device), grid, bias)
        return super().experts(x, counts, grid, bias, int8_activations)


class AsStored(OneByOne):
    """`KernelRow.reject`, `prepare` and `restore` for kernels that read the stored layout of any weight of their class."""

    def reject(self, problem: Problem) -> str | None:
        return None

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        return tensor

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        return tensor


def stack_tiles(
    grids: Sequence[Tiles],
    tile_rows: int,
    join: Callable[[Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]],
) -> tuple[Tiles, list[Tiles]] | None:
    """`KernelRow.stack` for layouts whose tensors are, in their first dimension, tiles of so many rows.

    Args:
        join: tensors in one memory, and each one's part of it.
    """
    first = grids[0]
    names = _operand_names(first)
    tables = [getattr(grid, "codebook", None) for grid in grids]
    for grid, table in zip(grids, tables, strict=True):
        if grid.out_features % tile_rows or grid.scales.dtype != first.scales.dtype:
            return None
        if _operand_names(grid) != names:
            return None
        if table is not tables[0] and (
            table is None or tables[0] is None or not torch.equal(table, tables[0])
        ):
            return None
    whole: dict[str, Any] = {"out_features": sum(grid.out_features for grid in grids)}
    parts: list[dict[str, Any]] = [{} for _ in grids]
    for name in names:
        whole[name], views = join([getattr(grid, name) for grid in grids])
        for part, view in zip(parts, views, strict=True):
            part[name] = view
    return replace(first, **whole), [
        replace(grid, **part) for grid, part in zip(grids, parts, strict=True)
    ]


def _operand_names(grid: PackedGrid | Fp8Grid) -> list[str]:
    """Of the tensors that the weight has."""
    return [name for name in grid.OPERANDS.values() if getattr(grid, name) is not None]
