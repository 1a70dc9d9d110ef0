"""Grids with the least squared error: the search that rounding, GPTQ and others share.

For fixed codes the best scale (and zero point) of a group is a linear regression of its weights on its grid points;
for a fixed grid the best codes are the nearest ones. Taking turns lowers the error at every turn and ends in a local
minimum, so it starts from several shrunken ranges: clipping a lone extreme value buys finer steps for all others.
(Lloyd, "Least squares quantization in PCM", 1982, with the points bound to a grid.) Operator:

    hfq::search_grid(weight [N, K], importance? [K] or [N, K], scales [A, N, G], zeros? [A, N, G], codebook? [16], bits,
                     group_size, dtype, turns) -> (scales [N, G], zeros [N, G])

takes so many turns from each of A grids and gives the best that it met for each group, in the values that `dtype`
holds. All float32. In PyTorch here; native code for the CPU (kernels/cpu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import affine
from .spec import IntSpec, QuantSpec, SpqrSpec

__all__ = ["column_costs", "fit_grid", "row_slices", "weighted_sum"]

# Fractions of the range to start from. At 4 bits and groups of 128 nearly all groups end at 0.75 of the range or more;
# at 2 bits they end anywhere from 0.3 up.
_SHRINKS = {2: (1.0, 0.85, 0.7, 0.55, 0.4), 3: (1.0, 0.87, 0.75, 0.6)}
_SHRINKS_ABOVE = (1.0, 0.93, 0.85, 0.75)
# Weights at a time, so that the grids to start from take little memory; and in PyTorch on the CPU, whose intermediates are of
# the size of the weight, few enough to stay in the cache. Rows are independent of each other.
_SLICE = 1 << 22
_CACHED = 1 << 18
# More turns lower the squared error by less than 0.5% (trained weights, 2 to 4 bits, groups of 128).
_TURNS = 5

_LIBRARY: Any = torch.library.Library("hfq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "search_grid(Tensor weight, Tensor? importance, Tensor scales, Tensor? zeros, Tensor? codebook, int bits, "
    "int group_size, ScalarType dtype, int turns) -> (Tensor, Tensor)"
)


def fit_grid(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points with a small weighted squared error, never larger than that of `range_grid`.

    Args:
        weight: float32 `[N, K]`.
        importance: float32 `[K]` or `[N, K]`, at least 0: what an error of 1 costs in each column, or in each weight.
            None: all the same.

    Returns:
        (scales, zeros) as they will be stored, float32 `[N, G]`; zeros is None for symmetric grids and codebooks,
        and fractional otherwise. Those of an `SpqrSpec` are still to be quantized (`hfq.core.fit_bilevel`).
    """
    found = [
        _fit_rows(weight[rows], spec, _of_rows(importance, rows))
        for rows in row_slices(weight, _SLICE)
    ]
    scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scales, None if spec.sym else zeros


def _fit_rows(weight: Tensor, spec: QuantSpec, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    scales, zeros = _starts(weight, spec)
    values = affine.codebook_of(spec, weight.device)
    importance = None if importance is None else importance.contiguous()
    found: tuple[Tensor, Tensor] = torch.ops.hfq.search_grid(
        *(weight.contiguous(), importance, scales, zeros, values, spec.bits, spec.group_size),
        *(spec.torch_scale_dtype, _TURNS),
    )
    return _near_zero(*found, weight, spec) if isinstance(spec, SpqrSpec) else found


def row_slices(weight: Tensor, size: int) -> list[slice]:
    """Rows with about so many weights, one slice after the other."""
    step = max(1, size // max(1, weight.shape[1]))
    return [slice(first, first + step) for first in range(0, max(1, len(weight)), step)]


def _of_rows(values: Tensor | None, rows: slice) -> Tensor | None:
    return values if values is None or values.dim() == 1 else values[rows]


def _near_zero(
    scales: Tensor, zeros: Tensor | None, weight: Tensor, spec: SpqrSpec
) -> tuple[Tensor, Tensor]:
    """A grid that covers 0 instead of one that lies further away from 0 than it is long.

    Weights that are nearly equal ask for tiny steps and a zero point in the thousands, which would leave nothing of the
    zero points of the rows that share its steps.
    """
    wide_scales, wide_zeros = affine.range_grid(weight, spec)
    assert zeros is not None and wide_zeros is not None
    most = spec.levels - 1
    near = (zeros >= -most) & (zeros <= 2 * most)
    return torch.where(near, scales, wide_scales), torch.where(near, zeros, wide_zeros)


def column_costs(groups: Tensor, columns: int, importance: Tensor) -> Tensor:
    """What each column of the groups counts: `[K]` -> `[G, S]`, `[N, K]` -> `[N, G, S]`.

    Repeated columns of a short last group count nothing.
    """
    padded = importance.new_zeros(*importance.shape[:-1], groups.shape[1] * groups.shape[2])
    padded[..., :columns] = importance
    return padded.view(*importance.shape[:-1], *groups.shape[1:])


def weighted_sum(values: Tensor, costs: Tensor | None) -> Tensor:
    """Sum over the columns of each group, `[N, G, S]` -> `[N, G]`."""
    # A matrix product would be faster, but its rows would depend on how many there are.
    return (values if costs is None else values * costs).sum(-1)


def _starts(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Grids to start from, `[A, N, G]`: the covering one first, then shrunken ones around the middle of the range."""
    scales, zeros = affine.range_grid(weight, spec)
    # Its stored scale reaches a little further, so that no group does worse than by plain rounding.
    scales = affine.stored_scales(scales, spec).float()
    shrinks = _SHRINKS.get(spec.bits, _SHRINKS_ABOVE)
    if zeros is None:
        # A symmetric integer grid reaches one step further on one side: either sign may win.
        signs = (1.0, -1.0) if isinstance(spec, IntSpec) else (1.0,)
        return torch.stack([scales * (sign * s) for s in shrinks for sign in signs]), None
    groups = affine.group_columns(weight, spec.group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    all_scales, all_zeros = [scales], [zeros]
    for shrink in shrinks:
        step = (high - low) * (shrink / (spec.levels - 1))
        middle = (high / 2 + low / 2) / torch.where(step > 0, step, torch.ones_like(step))
        all_scales.append(step)
        all_zeros.append((spec.levels - 1) / 2 - middle)
    return torch.stack(all_scales), torch.stack(all_zeros)


# ---- hfq::search_grid in PyTorch


def _search_grid(
    weight: Tensor,
    importance: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    points: Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    turns: int,
) -> tuple[Tensor, Tensor]:
    best_scales = torch.empty_like(scales[0])
    best_zeros = torch.full_like(scales[0], 1 << (bits - 1))
    for rows in row_slices(weight, _CACHED if weight.is_cpu else _SLICE):
        search = _Search(weight[rows], _of_rows(importance, rows), points, bits, group_size, dtype)
        for start, start_scales in enumerate(scales[:, rows]):
            search.turns(start_scales, None if zeros is None else zeros[start, rows], turns)
        best_scales[rows] = search.scales
        if search.zeros is not None:
            best_zeros[rows] = search.zeros
    return best_scales, best_zeros


_LIBRARY.impl("search_grid", _search_grid, "CompositeExplicitAutograd")


class _Search:
    """The best grids met so far for the groups of some rows: scales and zeros `[N, G]`."""

    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        importance: Tensor | None,
        points: Tensor | None,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.groups = affine.group_columns(weight, group_size)
        _, count, size = self.groups.shape
        if importance is None and count * size != weight.shape[1]:
            importance = torch.ones(weight.shape[1], device=weight.device)
        self.costs = (
            None if importance is None else column_costs(self.groups, weight.shape[1], importance)
        )
        self.points, self.bits, self.dtype = points, bits, dtype
        self.least: Tensor | None = None

    def turns(self, scales: Tensor, zeros: Tensor | None, count: int) -> None:
        """Alternate nearest codes and least squares grids."""
        for _ in range(count):
            scales = _as_stored(scales, self.dtype)
            zeros = None if zeros is None else zeros.to(self.dtype).float()
            points = affine.grid_points(self.groups, scales, zeros, self.points, self.bits)
            missed = (self.groups - points * scales.unsqueeze(-1)).square_()
            self._keep(scales, zeros, weighted_sum(missed, self.costs))
            scales, zeros = _regress(self.groups, points, self.costs, scales, zeros)

    def _keep(self, scales: Tensor, zeros: Tensor | None, error: Tensor) -> None:
        if self.least is None:
            self.scales, self.zeros = scales, zeros
            self.least = torch.full_like(error, torch.inf)
        better = error < self.least
        self.least = torch.where(better, error, self.least)
        self.scales = torch.where(better, scales, self.scales)
        if zeros is not None and self.zeros is not None:
            self.zeros = torch.where(better, zeros, self.zeros)


def _as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest; away from zero where that would be 0."""
    nearest = scales.to(dtype).float()
    return torch.where(nearest == 0, affine.rounded_away(scales, dtype).float(), nearest)


def _regress(
    groups: Tensor, points: Tensor, costs: Tensor | None, scales: Tensor, zeros: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The best grid for the codes behind `points`; the old one where they do not determine it."""
    if zeros is None:
        slope = weighted_sum(groups * points, costs) / weighted_sum(points.square(), costs)
        return torch.where(slope.isfinite() & (slope != 0), slope, scales), None
    total = groups.shape[-1] if costs is None else costs.sum(-1)
    x, y = weighted_sum(points, costs) / total, weighted_sum(groups, costs) / total
    centred = points - x.unsqueeze(-1)
    slope = weighted_sum(groups * centred, costs) / weighted_sum(centred.square_(), costs)
    offset = (x - y / slope) + zeros
    usable = slope.isfinite() & (slope > 0) & offset.isfinite()
    return torch.where(usable, slope, scales), torch.where(usable, offset, zeros)
