"""``rtn``: round to nearest. No data, no iterations.

With ``scale_search`` each group tries `SHRINKS` fractions of the scale that covers its range and keeps the one
with the least squared error: clipping a lone extreme value buys finer steps for all others. The search for
symmetric grids tries both signs of the scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import affine
from ..core.errors import ConfigError
from ..core.spec import IntSpec, QuantSpec
from ..core.weight import QuantizedWeight
from . import ALGORITHMS

# Below 0.6 no group of a normal, Laplace or uniform sample gained at 2 to 8 bits.
SHRINKS = tuple(1.0 - 0.02 * i for i in range(21))


class RoundToNearest:
    """Round every weight to the nearest point of a grid that covers (or nearly covers) its group."""

    defaults: Mapping[str, object] = {"format": "int"}
    options: Mapping[str, object] = {"scale_search": False}

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        if not isinstance(options["scale_search"], bool):
            raise ConfigError(f"scale_search must be True or False, got {options['scale_search']!r}")

    def quantize(self, weight: Tensor, spec: QuantSpec, options: Mapping[str, object]) -> QuantizedWeight:
        scales, zeros = affine.range_grid(weight, spec)
        if options["scale_search"]:
            scales, zeros = search_scales(weight, scales, zeros, spec)
        return affine.encode(weight, scales, zeros, spec)


def search_scales(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """The best of the shrunk grids for each group, by squared error.

    Args:
        weight: float32 `[N, K]`.
        scales, zeros: the covering grid, float32 `[N, G]`.
    """
    best_scales, best_zeros = scales.clone(), None if zeros is None else zeros.clone()
    best_error = torch.full_like(scales, float("inf"))
    signs = (1.0, -1.0) if isinstance(spec, IntSpec) and spec.sym else (1.0,)
    for shrink in SHRINKS:
        for sign in signs:
            trial = scales * (shrink * sign)
            error = _group_error(weight, trial, zeros, spec)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scales = torch.where(better, trial, best_scales)
    return best_scales, best_zeros


def _group_error(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """Squared error of each group when rounded to the grid: `[N, G]`."""
    codes = affine.round_to_grid(weight, scales, zeros, spec)
    rounded = QuantizedWeight(spec=spec, codes=codes, scales=scales, zeros=zeros).dequantize()
    return affine.group_columns((rounded - weight).square_(), spec.group_size).sum(-1)


ALGORITHMS.register("rtn", RoundToNearest())
