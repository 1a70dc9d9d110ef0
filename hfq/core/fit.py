"""Grids with the least squared error: the search that rounding, GPTQ and others share.

For fixed codes the best scale (and zero point) of a group is a linear regression of its weights on its grid points;
for a fixed grid the best codes are the nearest ones. Taking turns lowers the error at every turn and ends in a local
minimum, so it starts from several shrunken ranges: clipping a lone extreme value buys finer steps for all others.
(Lloyd, "Least squares quantization in PCM", 1982, with the points bound to a grid.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import affine
from .spec import CodebookSpec, IntSpec, QuantSpec, SpqrSpec

__all__ = ["column_costs", "fit_grid", "weighted_sum"]

# Fractions of the range to start from. At 4 bits and groups of 128 nearly all groups end at 0.75 of the range or more;
# at 2 bits they end anywhere from 0.3 up.
_SHRINKS = {2: (1.0, 0.85, 0.7, 0.55, 0.4), 3: (1.0, 0.87, 0.75, 0.6)}
_SHRINKS_ABOVE = (1.0, 0.93, 0.85, 0.75)
# Weights at a time: their intermediates stay in the cache. Rows are independent of each other.
_SLICE = 1 << 18
# More turns lower the squared error by less than 0.5% (trained weights, 2 to 4 bits, groups of 128).
_TURNS = 5


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
    rows = max(1, _SLICE // max(1, weight.shape[1]))
    if len(weight) > rows:
        parts = [_fit_rows(part, spec, importance) for part in torch.split(weight, rows)]
        zeros = [zeros for _, zeros in parts if zeros is not None]
        return torch.cat([scales for scales, _ in parts]), torch.cat(zeros) if zeros else None
    return _fit_rows(weight, spec, importance)


def _fit_rows(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    groups = affine.group_columns(weight, spec.group_size)
    costs = None
    if importance is None and groups.shape[1] * groups.shape[2] != weight.shape[1]:
        importance = torch.ones(weight.shape[1], device=weight.device)
    if importance is not None:
        costs = column_costs(groups, weight.shape[1], importance)
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.full(groups.shape[:2], torch.inf, device=weight.device)
    for scales, zeros in _starts(weight, groups, spec):
        for _ in range(_TURNS):
            scales = _as_stored(scales, spec)
            zeros = None if zeros is None else zeros.to(spec.torch_scale_dtype).float()
            points = affine.grid_points(groups, scales, zeros, spec)
            error = weighted_sum((groups - points * scales.unsqueeze(-1)).square_(), costs)
            better = error < least
            best = _choose(better, (scales, zeros), best or (scales, zeros))
            least = torch.where(better, error, least)
            scales, zeros = _regress(groups, points, costs, scales, zeros)
    assert best is not None
    return _near_zero(*best, weight, spec) if isinstance(spec, SpqrSpec) else best


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


def _as_stored(scales: Tensor, spec: QuantSpec) -> Tensor:
    """To nearest; away from zero where that would be 0."""
    nearest = scales.to(spec.torch_scale_dtype).float()
    return torch.where(nearest == 0, affine.stored_scales(scales, spec).float(), nearest)


def _starts(
    weight: Tensor, groups: Tensor, spec: QuantSpec
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The covering grid first, then shrunken ones around the middle of each group's range."""
    scales, zeros = affine.range_grid(weight, spec)
    # Its stored scale reaches a little further, so that no group does worse than by plain rounding.
    scales = affine.stored_scales(scales, spec).float()
    yield scales, zeros
    shrinks = _SHRINKS.get(spec.bits, _SHRINKS_ABOVE)
    if isinstance(spec, CodebookSpec) or zeros is None:
        # A symmetric integer grid reaches one step further on one side: either sign may win.
        signs = (1.0, -1.0) if isinstance(spec, IntSpec) else (1.0,)
        for factor in (sign * shrink for shrink in shrinks for sign in signs):
            if factor != 1.0:
                yield scales * factor, None
        return
    low, high = groups.amin(-1), groups.amax(-1)
    for shrink in shrinks:
        step = (high - low) * (shrink / (spec.levels - 1))
        middle = (high / 2 + low / 2) / torch.where(step > 0, step, torch.ones_like(step))
        yield step, (spec.levels - 1) / 2 - middle


def _choose(
    better: Tensor, new: tuple[Tensor, Tensor | None], old: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Group by group, the new grid where it is better."""
    scales = torch.where(better, new[0], old[0])
    if new[1] is None or old[1] is None:
        return scales, None
    return scales, torch.where(better, new[1], old[1])


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
