"""``spqr``: column by column as in GPTQ, with the most sensitive weights stored apart and quantized scales.

Dettmers et al., "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", 2023:

1. Sensitivity (equation 2): the squared error of a weight counts by what later columns cannot make good of it,
   ``costs`` of `hfq.core.statistics.Factor`. A weight is an outlier if leaving it out lowers the error of its group by
   much: its own, and where it is the smallest or largest of the group also that of all others, whose grid gets finer.
   The largest gains over the whole matrix are taken, as many as the spec says.
2. Grids: for each small group the scale and zero point with the least squared error over what is left, quantized
   themselves together with those of neighbouring rows (`hfq.core.fit_bilevel`).
3. Rounding: column by column on the grids as they are stored; outliers get the difference to their dense value stored,
   and what that is rounded by is fed back, too.

Options:

    damp_percent   added to the diagonal of the inputs' second moment, as a share of its mean
    desc_act       columns with the largest activations first; groups stay runs of neighbours
    refine         how often all codes and outliers are chosen again afterwards, all others known (`hfq.core.refine`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core import affine
from ..core.checks import check_flag, check_integer, check_share
from ..core.columns import ColumnRounder, ColumnRounding, StaticGrid, round_one_by_one
from ..core.errors import CalibrationError, ConfigError
from ..core.fit import column_costs
from ..core.fit_bilevel import fit_bilevel_grid
from ..core.outliers import collect_outliers, largest
from ..core.refine import refine_codes
from ..core.spec import SCALE_BLOCK, QuantSpec, SpqrSpec, columns_per_group, outlier_count
from ..core.statistics import Factor, InputStatistics
from ..core.weight import QuantizedWeight
from . import ALGORITHMS


class Spqr:
    """Second-order rounding with outliers and bilevel scales."""

    calibrated = True
    orders_columns = False
    defaults: Mapping[str, object] = {"format": "spqr"}
    options: Mapping[str, object] = {"damp_percent": 0.01, "desc_act": True, "refine": 2}

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        if not isinstance(spec, SpqrSpec):
            raise ConfigError(
                "method 'spqr' chooses outliers and bilevel scales, which only format 'spqr' stores; use method 'gptq' "
                "for other formats"
            )
        check_flag("desc_act", options["desc_act"])
        check_integer("refine", options["refine"], 0)
        check_share("damp_percent", options["damp_percent"])

    def quantize(
        self,
        weight: Tensor,
        spec: QuantSpec,
        options: Mapping[str, object],
        statistics: InputStatistics | None = None,
    ) -> QuantizedWeight:
        if statistics is None:
            raise CalibrationError(
                "method 'spqr' needs statistics of the activations: give calibration data (dataset=...)"
            )
        affine.check_finite(weight)
        damp_percent, turns = options["damp_percent"], options["refine"]
        assert isinstance(spec, SpqrSpec) and isinstance(damp_percent, (int, float))
        assert isinstance(turns, int)
        factor = statistics.factor(float(damp_percent), bool(options["desc_act"]))
        outliers = _most_sensitive(weight, spec, factor)
        importance = torch.where(outliers, 0.0, _damped(statistics.importance, factor))
        grid = fit_bilevel_grid(weight, spec, importance)
        with statistics.damped(factor.damping) as hessian:
            return _round(weight, spec, factor, grid, outliers, hessian, turns)


def _damped(importance: Tensor, factor: Factor) -> Tensor:
    """The diagonal as it was factorised, so that no column counts nothing: float32 `[K]`."""
    mean = importance.mean()
    return importance + torch.where(mean > 0, factor.damping * mean, torch.ones_like(mean))


def _most_sensitive(weight: Tensor, spec: SpqrSpec, factor: Factor) -> Tensor:
    """The places of the outliers: bool `[N, K]`."""
    costs = torch.empty_like(factor.costs).index_copy_(0, factor.order, factor.costs)
    gains = [_leave_one_out(rows, spec, costs) for rows in torch.split(weight, SCALE_BLOCK)]
    return largest(torch.cat(gains), outlier_count(spec, *weight.shape))


def _leave_one_out(weight: Tensor, spec: SpqrSpec, costs: Tensor) -> Tensor:
    """By how much the error of its group falls where a weight is left out: float32 `[N, K]`.

    On grids that cover the range of what is left, which only the smallest and the largest weight of a group change.
    """
    groups = affine.group_columns(weight, spec.group_size)
    counts = column_costs(groups, weight.shape[1], costs)
    low, second_low = _two_smallest(groups, weight.shape[1])
    high, second_high = (-each for each in _two_smallest(-groups, weight.shape[1]))
    own = _errors(groups, low, high, spec) * counts
    gains = own.clone()
    for extreme, rest_low, rest_high in (
        (groups.argmin(-1, keepdim=True), second_low, high),
        (groups.argmax(-1, keepdim=True), low, second_high),
    ):
        of_rest = _errors(groups, rest_low, rest_high, spec) * counts
        of_rest.scatter_(-1, extreme, 0)
        gain = (own.sum(-1) - of_rest.sum(-1)).unsqueeze(-1)
        gains.scatter_(-1, extreme, torch.maximum(gain, own.gather(-1, extreme)))
    return gains.flatten(1)[:, : weight.shape[1]]


def _two_smallest(groups: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Of each group `[N, G, S]`, without the repeated columns of a short last one; twice the same of a single column."""
    last = columns - (groups.shape[1] - 1) * groups.shape[2]
    groups = groups.clone()
    groups[:, -1, last:] = torch.inf
    ascending = groups.sort(-1).values
    second = ascending[..., min(1, groups.shape[-1] - 1)]
    return ascending[..., 0], torch.where(second.isinf(), ascending[..., 0], second)


def _errors(groups: Tensor, low: Tensor, high: Tensor, spec: SpqrSpec) -> Tensor:
    """Squared errors `[N, G, S]` on grids from low to high, `[N, G]`; what is beyond is clipped."""
    low, most = low.unsqueeze(-1), spec.levels - 1
    scale = (high.unsqueeze(-1) - low) / most
    codes = ((groups - low) / scale).nan_to_num_(0).round_().clamp_(0, most)
    return (groups - (low + codes * scale)).square_()


def _round(
    weight: Tensor,
    spec: SpqrSpec,
    factor: Factor,
    grid: affine.StoredGrid,
    outliers: Tensor,
    hessian: Tensor,
    turns: int,
) -> QuantizedWeight:
    """Codes and outliers on a grid that is stored already."""
    rounding = ColumnRounding(weight, factor)
    size = columns_per_group(len(rounding), spec.group_size)
    beside = _WithOutliers(StaticGrid(grid, spec, size), outliers, spec)
    rounding.round(0, len(rounding), beside)
    quantized = grid.weight(rounding.codes(), spec)
    if turns and weight.numel():
        rounded = quantized.dequantize() + beside.differences
        codes = refine_codes(weight, rounded, quantized.codes, hessian, factor.order, beside, turns)
        quantized = replace(quantized, codes=codes)
    return replace(quantized, outliers=collect_outliers(outliers, beside.differences, spec))


class _WithOutliers:
    """A `ColumnGrid` beside which the outliers keep what it misses of them.

    Attributes:
        differences: that of the last call for each column, `[N, K]` in the dtype of the outliers; 0 for all others.
    """

    def __init__(self, grid: StaticGrid, outliers: Tensor, spec: SpqrSpec) -> None:
        self.grid, self.outliers = grid, outliers
        self.differences = torch.zeros(
            outliers.shape, dtype=spec.torch_stat_dtype, device=outliers.device
        )

    def round(
        self, columns: Tensor, targets: Tensor, origins: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `ColumnGrid`."""
        rounders = [
            _beside(rounder, self.outliers[:, column], self.differences[:, column])
            for rounder, column in zip(self.grid.rounders(columns), columns.tolist(), strict=True)
        ]
        return round_one_by_one(targets, origins, asked, rounders)


def _beside(rounder: ColumnRounder, outliers: Tensor, differences: Tensor) -> ColumnRounder:
    """A rounder that stores what it misses of the outliers of a column (bool `[N]`) in `differences` (`[N]`)."""

    def round_with_outliers(column: Tensor) -> tuple[Tensor, Tensor]:
        codes, dense = rounder(column)
        differences.copy_((column - dense) * outliers)
        return codes, dense + differences

    return round_with_outliers


ALGORITHMS.register("spqr", Spqr())
