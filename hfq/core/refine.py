"""Lower the error of codes that are chosen already: least squares grids and coordinate descent, in turns.

With E = W - Q the error of a layer is ``tr E H E^T`` (`hfq.core.statistics`), row by row. For fixed codes it is a
quadratic function of the row's scales and zero points, all groups together, and its minimum a linear system; for a
fixed grid the best code of one column, all others fixed, is the one nearest to ``w - e + (E H)_k / H_kk``. Neither step
can raise the error. Rounding column by column (GPTQ) never looks back: the second look takes 5 to 10 % off its
error at 3 bits, up to a quarter at 2. (Behdin et al., "QuantEase", 2023, for the descent on codes.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from .affine import StoredGrid, codebook_of
from .columns import COLUMN_BLOCK, ColumnGrid, StaticGrid
from .spec import CodebookSpec, IntSpec, QuantSpec, columns_per_group
from .weight import QuantizedWeight

__all__ = ["fits_grid", "refine", "refine_codes", "turns_for"]

# Of the linear systems of a slice of rows.
_SYSTEM_BYTES = 64 << 20

# Weights of such a slice: products of theirs stay in the cache.
_SLICE = 1 << 20

# Added to the diagonal of a system, as a share of its mean: codes of a group may all be the same.
_RIDGE = 1e-6


def turns_for(spec: QuantSpec, asked: object) -> int:
    """Turns of the option ``refine``: as many as were asked for, or with None those that pay.

    From 4 bits on a second one changes KL by less than two runs differ, at 2 bits it is 6 %.
    """
    if asked is None:
        return 2 if spec.bits < 4 else 1
    assert isinstance(asked, int)
    return asked


def fits_grid(spec: QuantSpec) -> bool:
    """Whether turns fit the grid as well: not where scales are stored as codes, and where it pays.

    For symmetric integers from 4 bits on it changes nothing (benchmarks/NOTES.md).
    """
    if isinstance(spec, IntSpec):
        return not spec.sym or spec.bits < 4
    return isinstance(spec, CodebookSpec) and not spec.double_quant


def refine(
    weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, order: Tensor, turns: int
) -> QuantizedWeight:
    """Codes and grid with an error that is no larger.

    Args:
        weight: float32 `[N, K]`, what the codes should stand for.
        hessian: float32 `[K, K]`, positive definite: damped.
        order: int64 `[K]`, in which columns are visited.
        turns: how often the grid is fitted (where that pays) and every code chosen again.
    """
    if not weight.numel():
        return quantized
    state = _State(weight, quantized, hessian)
    for _ in range(turns):
        if fits_grid(quantized.spec):
            state.fit_grid()
        state.choose_codes(order)
    return state.finished()


def refine_codes(
    weight: Tensor,
    rounded: Tensor,
    codes: Tensor,
    hessian: Tensor,
    order: Tensor,
    grid: ColumnGrid,
    turns: int,
) -> Tensor:
    """Codes with an error that is no larger, on a grid that stays as it is: uint8 `[N, K]`.

    Args:
        weight: float32 `[N, K]`, what the codes should stand for.
        rounded: float32 `[N, K]`, what they stand for now, with all that is stored beside them.
        codes: uint8 `[N, K]`.
        hessian, order, turns: see `refine`.
        grid: what it stores beside the codes is that of its last call.
    """
    columns, chosen = weight.T.contiguous(), codes.T.contiguous()
    errors = columns - rounded.T
    for _ in range(turns):
        _visit(columns, chosen, errors, hessian, order, grid)
    return chosen.T.contiguous()


class _State:
    """One weight between two turns. Columns lie in rows here, so that each is one run of memory.

    Attributes:
        errors: E^T, float32 `[K, N]`.
    """

    def __init__(self, weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> None:
        self.columns = weight.T.contiguous()
        self.spec, self.hessian, self.quantized = quantized.spec, hessian, quantized
        self.codes = quantized.codes.T.contiguous()
        self.scales = _columns(quantized.scales)
        self.zeros = None if quantized.zeros is None else _columns(quantized.zeros)
        self.errors = self.columns - quantized.dequantize().T

    def finished(self) -> QuantizedWeight:
        grid = self._grid()
        return replace(
            self.quantized,
            codes=self.codes.T.contiguous(),
            scales=grid.scales.contiguous(),
            zeros=None if grid.zeros is None else grid.zeros.contiguous(),
        )

    def _grid(self) -> StoredGrid:
        dtype = self.spec.torch_scale_dtype
        zeros = None if self.zeros is None else self.zeros.T.to(dtype)
        return StoredGrid(scales=self.scales.T.to(dtype), zeros=zeros)

    # ---- the grid

    def fit_grid(self) -> None:
        """The best grid for these codes, in rows where it is better once it is rounded to what is stored."""
        groups, rows = self.scales.shape
        unknowns = groups if self.zeros is None else 2 * groups
        step = max(1, min(_SYSTEM_BYTES // (4 * unknowns**2), _SLICE // len(self.columns)))
        for first in range(0, rows, step):
            self._fit_rows(slice(first, first + step))

    def _fit_rows(self, rows: slice) -> None:
        points, scales = self._points(rows), self.scales[:, rows]
        zeros = None if self.zeros is None else self.zeros[:, rows]
        system, slope = self._system(points, self.hessian @ self.errors[:, rows])
        steps = _solved(system, slope, len(scales))
        new_scales = self._stored(scales + steps[: len(scales)])
        usable = new_scales.isfinite() & (new_scales != 0)
        new_zeros = zeros
        if zeros is not None:
            new_zeros = self._stored(zeros - steps[len(scales) :] / new_scales)
            usable &= new_zeros.isfinite() & (new_scales > 0)
            new_zeros = torch.where(usable, new_zeros, zeros)
        new_scales = torch.where(usable, new_scales, scales)
        done = new_scales - scales
        if zeros is not None and new_zeros is not None:
            done = torch.cat([done, (zeros - new_zeros) * new_scales])
        # By what the error falls, as the steps were stored.
        gain = (done * (2 * slope - torch.einsum("nij,jn->in", system, done))).sum(0)
        better = gain > 0
        self.scales[:, rows] = torch.where(better, new_scales, scales)
        if self.zeros is not None and zeros is not None and new_zeros is not None:
            self.zeros[:, rows] = torch.where(better, new_zeros, zeros)
        rounded = self._points(rows) * self._spread(self.scales[:, rows])
        self.errors[:, rows] = self.columns[:, rows] - rounded

    def _system(self, points: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """``B^T H B`` `[rows, U, U]` and ``B^T H e`` `[U, rows]` of some rows.

        The U columns of B are the points of each group and, with zero points, ones in each group.

        Args:
            points: the codes of these rows in units of the scale, float32 `[K, rows]`.
            pull: H e, half of the error's gradient, float32 `[K, rows]`.
        """
        slope = [self._group_sums(pull * points)]
        system = self._products(points)
        if self.zeros is not None:
            slope.append(self._group_sums(pull))
            crossed = self._products_with_ones(points)
            ones = self._group_sums(self._hessian_sums.T).unsqueeze(-1).expand_as(crossed)
            system = torch.cat(
                [
                    torch.cat([system, crossed.transpose(0, 1)], dim=1),
                    torch.cat([crossed, ones], dim=1),
                ]
            )
        return system.permute(2, 0, 1).contiguous(), torch.cat(slope)

    def _products(self, points: Tensor) -> Tensor:
        """``p_g H p_h`` for the points p of each two groups: `[G, G, rows]`."""
        size, groups = self._group_size, len(self.scales)
        found = points.new_empty(groups, groups, points.shape[1])
        for group in range(groups):
            first = group * size
            behind = self.hessian[first:, first : first + size] @ points[first : first + size]
            sums = self._group_sums(behind.mul_(points[first:]))
            found[group, group:], found[group:, group] = sums, sums
        return found

    def _products_with_ones(self, points: Tensor) -> Tensor:
        """``1_g H p_h`` for ones in each group g and the points p of each group h: `[G, G, rows]`."""
        size = self._group_size
        parts = zip(
            torch.split(self._hessian_sums, size, dim=1), torch.split(points, size), strict=True
        )
        return torch.stack([sums @ part for sums, part in parts], dim=1)

    @cached_property
    def _hessian_sums(self) -> Tensor:
        """Sums of H's rows over each group: `[G, K]`."""
        return self._group_sums(self.hessian)

    # ---- the codes

    def choose_codes(self, order: Tensor) -> None:
        """Visit every column once: the best code for it while all others stay."""
        grid = StaticGrid(self._grid(), self.spec, self._group_size)
        _visit(self.columns, self.codes, self.errors, self.hessian, order, grid)

    # ---- columns and groups

    @property
    def _group_size(self) -> int:
        return columns_per_group(len(self.columns), self.spec.group_size)

    def _points(self, rows: slice) -> Tensor:
        codes = self.codes[:, rows]
        values = codebook_of(self.spec, codes.device)
        if values is not None:
            return values[codes.int()]
        if self.zeros is not None:
            return codes.float() - self._spread(self.zeros[:, rows])
        assert isinstance(self.spec, IntSpec)
        return codes.float() - self.spec.implied_zero

    def _spread(self, per_group: Tensor) -> Tensor:
        """`[G, X]` -> `[K, X]`."""
        return per_group.repeat_interleave(self._group_size, 0)[: len(self.columns)]

    def _group_sums(self, columns: Tensor) -> Tensor:
        """`[K, X]` -> `[G, X]`."""
        size = min(self._group_size, len(columns))
        whole = len(columns) // size
        sums = columns[: whole * size].reshape(whole, size, columns.shape[1]).sum(1)
        if whole * size == len(columns):
            return sums
        return torch.cat([sums, columns[whole * size :].sum(0, keepdim=True)])

    def _stored(self, values: Tensor) -> Tensor:
        return values.to(self.spec.torch_scale_dtype).float()


def _solved(system: Tensor, slope: Tensor, groups: int) -> Tensor:
    """The minimum of each row's quadratic form, `[U, rows]`; 0 where the system cannot be factorised."""
    system = system.clone()
    diagonal = system.diagonal(dim1=1, dim2=2)
    # Scales and shifts have units of their own: each is measured by the mean of its kind.
    means = diagonal.view(len(diagonal), -1, groups).mean(-1, keepdim=True)
    ridge = (_RIDGE * means + torch.finfo(torch.float32).tiny).expand(-1, -1, groups)
    diagonal.add_(ridge.flatten(1))
    lower, info = torch.linalg.cholesky_ex(system)
    found = torch.cholesky_solve(slope.T.unsqueeze(-1), lower).squeeze(-1).T
    return torch.where(info == 0, found, 0.0)


def _visit(
    columns: Tensor,
    codes: Tensor,
    errors: Tensor,
    hessian: Tensor,
    order: Tensor,
    grid: ColumnGrid,
) -> None:
    """Round every column once more, from the best value for it while all others stay.

    Args:
        columns, codes, errors: `[K, N]`, see `_State`; codes and errors are changed.
    """
    costs = hessian.diagonal()
    for block in torch.split(order, COLUMN_BLOCK):
        rows = hessian[block]
        # Exact float32: errors cancel along the directions that activations favour, such as their mean.
        pull = rows @ errors
        cost, before = costs[block].unsqueeze(1), errors[block]
        origins = columns[block] - before
        targets = origins + pull / cost
        chosen, changes = grid.round(block, targets, origins, rows[:, block] / cost)
        codes[block], errors[block] = chosen, before + changes


def _columns(per_group: Tensor) -> Tensor:
    return per_group.float().T.contiguous()
