"""Bilevel grids with a small squared error: what `hfq.core.fit` finds, brought into codes without giving it up.

Each group's best scale and zero point come first. Their codes share steps and offsets with other rows, so they miss
them by some percent; then every group looks among neighbouring pairs of codes for the one that serves its weights
best, which makes good for a part of that: a scale that is a little too long goes well with another zero point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .affine import StoredGrid, bilevel_grid, grid_points, group_columns
from .bilevel import encode_bilevel
from .fit import column_costs, fit_grid, weighted_sum
from .spec import SCALE_BLOCK, SpqrSpec
from .weight import ScaleCodes

__all__ = ["fit_bilevel_grid"]

# Searches of all 9 neighbouring pairs.
_TURNS = 3


def fit_bilevel_grid(weight: Tensor, spec: SpqrSpec, importance: Tensor) -> StoredGrid:
    """The grid as it will be stored.

    Args:
        weight: float32 `[N, K]`.
        importance: float32 `[N, K]`, at least 0: what an error of 1 costs in each weight. 0 leaves it out.
    """
    pieces = [
        _fit(rows, spec, costs)
        for rows, costs in zip(
            torch.split(weight, SCALE_BLOCK), torch.split(importance, SCALE_BLOCK), strict=True
        )
    ]
    scales, zeros = (_joined([piece[level] for piece in pieces]) for level in (0, 1))
    return bilevel_grid(scales, zeros, spec)


def _fit(weight: Tensor, spec: SpqrSpec, importance: Tensor) -> tuple[ScaleCodes, ScaleCodes]:
    scales, zeros = fit_grid(_filled(weight, spec, importance), spec, importance)
    assert zeros is not None
    groups = group_columns(weight, spec.group_size)
    costs = column_costs(groups, weight.shape[1], importance)
    points = grid_points(groups, scales, zeros, None, spec.bits)
    stored = encode_bilevel(scales, spec, weighted_sum(points.square(), costs))
    decoded = bilevel_grid(stored, stored, spec).scales
    stored_zeros = encode_bilevel(
        _best_zeros(groups, points, costs, decoded, zeros),
        spec,
        weighted_sum(torch.ones_like(points), costs) * decoded.square(),
    )
    return _search(groups, costs, stored, stored_zeros, spec)


def _filled(weight: Tensor, spec: SpqrSpec, importance: Tensor) -> Tensor:
    """The weight with the mean of its group where nothing counts, so that it does not widen the group's range."""
    groups = group_columns(weight, spec.group_size)
    counted = group_columns(importance, spec.group_size) > 0
    mean = (groups * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
    filled = torch.where(counted, groups, mean.nan_to_num(0))
    return filled.flatten(1)[:, : weight.shape[1]].contiguous()


def _best_zeros(
    groups: Tensor, points: Tensor, costs: Tensor, scales: Tensor, zeros: Tensor
) -> Tensor:
    """The zero points that suit other scales best, for the codes behind `points`: `[N, G]`."""
    missed = weighted_sum(points * scales.unsqueeze(-1) - groups, costs)
    found = zeros + missed / (costs.sum(-1) * scales)
    return torch.where(found.isfinite(), found, zeros)


def _search(
    groups: Tensor, costs: Tensor, scales: ScaleCodes, zeros: ScaleCodes, spec: SpqrSpec
) -> tuple[ScaleCodes, ScaleCodes]:
    """Better pairs of codes, steps and offsets as they are."""
    least = torch.full(scales.codes.shape, torch.inf, device=groups.device)
    codes = scales.codes, zeros.codes
    for _ in range(_TURNS):
        for pair in _neighbours(*codes, most=(1 << spec.stat_bits) - 1):
            grid = bilevel_grid(replace(scales, codes=pair[0]), replace(zeros, codes=pair[1]), spec)
            assert grid.zeros is not None
            points = grid_points(groups, grid.scales, grid.zeros, None, spec.bits)
            error = weighted_sum((groups - points * grid.scales.unsqueeze(-1)).square_(), costs)
            better = error < least
            codes = (
                torch.where(better, pair[0], codes[0]),
                torch.where(better, pair[1], codes[1]),
            )
            least = torch.where(better, error, least)
    return replace(scales, codes=codes[0]), replace(zeros, codes=codes[1])


def _neighbours(scales: Tensor, zeros: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A pair of uint8 codes itself, then the 8 around it."""
    for first in (0, -1, 1):
        for second in (0, -1, 1):
            yield (
                (scales.int() + first).clamp_(0, most).to(torch.uint8),
                (zeros.int() + second).clamp_(0, most).to(torch.uint8),
            )


def _joined(pieces: list[ScaleCodes]) -> ScaleCodes:
    return ScaleCodes(
        codes=torch.cat([piece.codes for piece in pieces]),
        step=torch.cat([piece.step for piece in pieces]),
        offset=torch.cat([piece.offset for piece in pieces]),
    )
