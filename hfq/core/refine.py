"""Lower the error of codes that are chosen already: least squares grids and coordinate descent, in turns.

With E = W - Q the error of a layer is ``tr E H E^T`` (`hfq.core.statistics`), row by row. For fixed codes it is a
quadratic function of the row's scales and zero points, all groups together, and its minimum a linear system; for a
fixed grid the best code of one column, all others fixed, is the one nearest to ``w - e + (E H)_k / H_kk``. Neither step
can raise the error. Rounding column by column (GPTQ) never looks back: the second look takes 5 to 10 % off its
error at 3 bits, up to a quarter at 2. (Behdin et al., "QuantEase", 2023, for the descent on codes.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from . import affine
from .codebooks import codebook
from .columns import COLUMN_BLOCK, ColumnRounder
from .spec import CodebookSpec, IntSpec, QuantSpec
from .weight import QuantizedWeight

__all__ = ["refine", "refine_codes"]

# Of the linear systems of a slice of rows.
_SYSTEM_BYTES = 64 << 20

# Weights of such a slice: products of theirs stay in the cache.
_SLICE = 1 << 20

# Added to the diagonal of a system, as a share of its mean: codes of a group may all be the same.
_RIDGE = 1e-6


def refine(
    weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, order: Tensor, turns: int
) -> QuantizedWeight:
    """Codes and grid with an error that is no larger.

    Args:
        weight: float32 `[N, K]`, what the codes should stand for.
        hessian: float32 `[K, K]`, positive definite: damped.
        order: int64 `[K]`, in which columns are visited.
        turns: how often the grid is fitted and every code chosen again.
    """
    if not weight.numel():
        return quantized
    state = _State(weight, quantized, hessian)
    for _ in range(turns):
        if quantized.scale_codes is None:
            state.fit_grid()
        state.choose_codes(order)
    return state.finished()


def refine_codes(
    weight: Tensor,
    rounded: Tensor,
    codes: Tensor,
    hessian: Tensor,
    order: Tensor,
    rounders: Sequence[ColumnRounder],
    turns: int,
) -> Tensor:
    """Codes with an error that is no larger, on a grid that stays as it is: uint8 `[N, K]`.

    Args:
        weight: float32 `[N, K]`, what the codes should stand for.
        rounded: float32 `[N, K]`, what they stand for now, with all that is stored beside them.
        codes: uint8 `[N, K]`.
        hessian, order, turns: see `refine`.
        rounders: of each column in that order; what they store beside the codes is that of their last call.
    """
    columns, chosen = weight.T.contiguous(), codes.T.contiguous()
    errors = columns - rounded.T
    pull = hessian @ errors
    for _ in range(turns):
        _visit(columns, chosen, errors, pull, hessian, order, rounders)
    return chosen.T.contiguous()


class _State:
    """One weight between two turns. Columns lie in rows here, so that each is one run of memory.

    Attributes:
        points: the codes in units of the scale, float32 `[K, N]`.
        errors: E^T, float32 `[K, N]`.
        pull: H E^T, half of the error's gradient, float32 `[K, N]`.
    """

    def __init__(self, weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> None:
        self.columns = weight.T.contiguous()
        self.spec, self.hessian, self.quantized = quantized.spec, hessian, quantized
        self.codes = quantized.codes.T.contiguous()
        self.scales = _columns(quantized.scales)
        self.zeros = None if quantized.zeros is None else _columns(quantized.zeros)
        self._look()

    def _look(self) -> None:
        self.points = self._points(self.zeros)
        self.errors = self.columns - self.points * self._spread(self.scales)
        self.pull = self.hessian @ self.errors

    def finished(self) -> QuantizedWeight:
        dtype = self.spec.torch_scale_dtype
        return replace(
            self.quantized,
            codes=self.codes.T.contiguous(),
            scales=self.scales.T.to(dtype).contiguous(),
            zeros=None if self.zeros is None else self.zeros.T.to(dtype).contiguous(),
        )

    # ---- the grid

    def fit_grid(self) -> None:
        """The best grid for these codes, in rows where it is better once it is rounded to what is stored."""
        before = (self.errors * self.pull).sum(0)
        old = self.scales, self.zeros, self.points, self.errors, self.pull
        steps, shifts = self._solve()
        scales = _stored(self.scales + steps, self.spec)
        zeros = None
        usable = scales.isfinite() & (scales != 0)
        if self.zeros is not None and shifts is not None:
            zeros = _stored(self.zeros - shifts / scales, self.spec)
            usable &= zeros.isfinite() & (scales > 0)
            zeros = torch.where(usable, zeros, self.zeros)
        self.scales, self.zeros = torch.where(usable, scales, self.scales), zeros
        self._look()
        worse = ~((self.errors * self.pull).sum(0) < before)
        new = self.scales, self.zeros, self.points, self.errors, self.pull
        for now, kept in zip(new, old, strict=True):
            if now is not None and kept is not None:
                now[:, worse] = kept[:, worse]

    def _solve(self) -> tuple[Tensor, Tensor | None]:
        """What to add to the scales, and to the values at code 0 where there are zero points: `[G, N]` each."""
        groups, rows = self.scales.shape
        unknowns = groups if self.zeros is None else 2 * groups
        step = max(1, min(_SYSTEM_BYTES // (4 * unknowns**2), _SLICE // len(self.columns)))
        found = torch.cat(
            [self._solve_rows(slice(first, first + step)) for first in range(0, rows, step)], dim=1
        )
        return found[:groups], None if self.zeros is None else found[groups:]

    def _solve_rows(self, rows: slice) -> Tensor:
        """The linear systems ``B^T H B x = B^T H e`` of some rows: `[G or 2 G, rows]`.

        The columns of B are the points of each group and, with zero points, ones in each group.
        """
        points, pull = self.points[:, rows].contiguous(), self.pull[:, rows]
        groups = len(self.scales)
        right = [self._group_sums(pull * points)]
        systems = [self._products(points)]
        if self.zeros is not None:
            right.append(self._group_sums(pull))
            crossed = self._products_with_ones(points)
            ones = self._group_sums(self._hessian_sums.T).unsqueeze(-1).expand_as(crossed)
            systems = [
                torch.cat([systems[0], crossed.transpose(0, 1)], dim=1),
                torch.cat([crossed, ones], dim=1),
            ]
        system = torch.cat(systems).permute(2, 0, 1).contiguous()
        diagonal = system.diagonal(dim1=1, dim2=2)
        # Scales and shifts have units of their own: each is measured by the mean of its kind.
        means = diagonal.view(len(diagonal), -1, groups).mean(-1, keepdim=True)
        ridge = (_RIDGE * means + torch.finfo(torch.float32).tiny).expand(-1, -1, groups)
        diagonal.add_(ridge.flatten(1))
        lower, info = torch.linalg.cholesky_ex(system)
        found = torch.cholesky_solve(torch.cat(right).T.unsqueeze(-1), lower).squeeze(-1).T
        return torch.where(info == 0, found, 0.0)

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
        of_groups = affine.group_rounders(self.scales, self.zeros, self.spec)
        rounders = [of_groups[column // self._group_size] for column in order.tolist()]
        _visit(self.columns, self.codes, self.errors, self.pull, self.hessian, order, rounders)
        self.points = self._points(self.zeros)

    # ---- columns and groups

    @property
    def _group_size(self) -> int:
        return len(self.columns) if self.spec.group_size == -1 else self.spec.group_size

    def _points(self, zeros: Tensor | None) -> Tensor:
        if isinstance(self.spec, CodebookSpec):
            return codebook(self.spec.codebook, self.codes.device)[self.codes.int()]
        assert isinstance(self.spec, IntSpec)
        zero = self.spec.implied_zero if zeros is None else self._spread(zeros)
        return self.codes.float() - zero

    def _spread(self, per_group: Tensor) -> Tensor:
        """`[G, N]` -> `[K, N]`."""
        return per_group.repeat_interleave(self._group_size, 0)[: len(self.columns)]

    def _group_sums(self, columns: Tensor) -> Tensor:
        """`[K, X]` -> `[G, X]`."""
        size = self._group_size
        return torch.stack([part.sum(0) for part in torch.split(columns, size)])


def _visit(
    columns: Tensor,
    codes: Tensor,
    errors: Tensor,
    pull: Tensor,
    hessian: Tensor,
    order: Tensor,
    rounders: Sequence[ColumnRounder],
) -> None:
    """Round every column once more, from the best value for it while all others stay.

    Args:
        columns, codes, errors, pull: `[K, N]`, see `_State`; all but the first are changed.
        rounders: of each column in the order of the visits.
    """
    costs = hessian.diagonal()
    for start in range(0, len(order), COLUMN_BLOCK):
        block = order[start : start + COLUMN_BLOCK]
        ahead = hessian[block]
        among = ahead[:, block]
        pulled, changes = pull[block], torch.empty_like(pull[: len(block)])
        for index, column in enumerate(block.tolist()):
            rounder = rounders[start + index]
            wanted = columns[column] - errors[column] + pulled[index] / costs[column]
            codes[column], rounded = rounder(wanted)
            error = columns[column] - rounded
            torch.sub(error, errors[column], out=changes[index])
            errors[column] = error
            pulled[index + 1 :].addr_(among[index, index + 1 :], changes[index])
        pull.addmm_(ahead.T, changes)


def _columns(per_group: Tensor) -> Tensor:
    return per_group.float().T.contiguous()


def _stored(values: Tensor, spec: QuantSpec) -> Tensor:
    return values.to(spec.torch_scale_dtype).float()
