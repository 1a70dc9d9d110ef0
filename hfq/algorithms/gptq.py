"""``gptq``: rounding column by column, each column answering for the errors of those before it.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022; the equations are in `hfq.core.statistics.Factor`. Options:

    damp_percent   added to the diagonal of the inputs' second moment, as a share of its mean
    desc_act       columns with the largest activations first ("act-order"): they are rounded before errors pile up
    scale_search   grids with the least squared error (`hfq.core.fit`) instead of those that cover the range
    refine         how often grids and codes are chosen again afterwards, all others known (`hfq.core.refine`); None: once,
                   and twice below 4 bits
    gptaq          0 to 1: which share of the drift of the inputs is made good. The layers before are quantized, so
                   this one reads x instead of the float model's x'; its best float weight for that is

                       W + gptaq * W D (H + damping)^-1        D = mean of (x' - x) x^T

                   (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025, in
                   closed form: rounding then starts from that weight)

Grids are chosen when the first column of their group comes up, from weights that carry the corrections so far. With
`desc_act`, and where scales are quantized themselves, all grids are chosen before the first column ("static groups"),
so that groups stay runs of neighbours and reading the weight costs nothing extra. The setting ``static_groups=False``
of format "int" makes groups of columns that are rounded one after the other instead, and stores which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core import affine
from ..core.checks import check_flag, check_integer, check_share
from ..core.columns import ColumnRounding, StaticGrid
from ..core.errors import CalibrationError, ConfigError
from ..core.fit import fit_grid
from ..core.refine import refine, turns_for
from ..core.spec import CodebookSpec, Fp8Spec, QuantSpec, SpqrSpec, columns_per_group
from ..core.statistics import Factor, InputStatistics
from ..core.weight import QuantizedWeight
from . import ALGORITHMS

# Weight, spec and importance of each column to (scales, zeros); see `hfq.core.fit.fit_grid`.
_FindGrid = Callable[[Tensor, QuantSpec, Tensor], tuple[Tensor, Tensor | None]]


class Gptq:
    """Second-order rounding with calibrated inputs."""

    calibrated = True
    orders_columns = True
    defaults: Mapping[str, object] = {"format": "int"}
    options: Mapping[str, object] = {
        "damp_percent": 0.01,
        "desc_act": True,
        "scale_search": True,
        "refine": None,
        "gptaq": 0.0,
    }

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        if isinstance(spec, SpqrSpec):
            raise ConfigError(
                "method 'gptq' chooses no outliers and no bilevel scales: format 'spqr' needs method 'spqr'"
            )
        if isinstance(spec, Fp8Spec):
            raise ConfigError(
                "method 'gptq' rounds to integers and to codebooks of 16 values, not to 8-bit floats: use method 'rtn' or "
                "'smoothquant' with format 'fp8', or format 'int8'"
            )
        for name in ("desc_act", "scale_search"):
            check_flag(name, options[name])
        if options["refine"] is not None:
            check_integer("refine", options["refine"], 0)
        for name in ("damp_percent", "gptaq"):
            check_share(name, options[name])
        if not spec.static_groups and not options["desc_act"]:
            raise ConfigError(
                "static_groups=False lets groups follow the order of rounding, which desc_act=False leaves as it is: "
                "set desc_act=True or leave static_groups out"
            )

    def quantize(
        self,
        weight: Tensor,
        spec: QuantSpec,
        options: Mapping[str, object],
        statistics: InputStatistics | None = None,
    ) -> QuantizedWeight:
        if statistics is None:
            raise CalibrationError(
                "method 'gptq' needs statistics of the activations: give calibration data (dataset=...)"
            )
        affine.check_finite(weight)
        damp_percent, gptaq = options["damp_percent"], options["gptaq"]
        assert isinstance(damp_percent, (int, float)) and isinstance(gptaq, (int, float))
        turns = turns_for(spec, options["refine"])
        factor = statistics.factor(float(damp_percent), bool(options["desc_act"]))
        if gptaq and statistics.drift is not None:
            weight = weight + gptaq * _drift_correction(weight, statistics.drift, factor)
        find_grid = fit_grid if options["scale_search"] else _range_grid
        if not spec.static_groups:
            return _groups_in_order(weight, spec, factor, find_grid, statistics, turns)
        if options["desc_act"] or (isinstance(spec, CodebookSpec) and spec.double_quant):
            quantized = _static_groups(weight, spec, factor, find_grid, statistics.importance)
        else:
            quantized = _group_by_group(weight, spec, factor, find_grid)
        if not turns:
            return quantized
        with statistics.damped(factor.damping) as hessian:
            return refine(weight, quantized, hessian, factor.order, turns)


def _drift_correction(weight: Tensor, drift: Tensor, factor: Factor) -> Tensor:
    """W D (H + damping)^-1, `[N, K]`."""
    upper = factor.feedback * factor.costs.sqrt()
    rows = (weight @ drift)[:, factor.order]
    rows = torch.linalg.solve_triangular(upper.T, rows, upper=False, left=False)
    rows = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
    return torch.empty_like(weight).index_copy_(1, factor.order, rows)


def _group_by_group(
    weight: Tensor, spec: QuantSpec, factor: Factor, find_grid: _FindGrid
) -> QuantizedWeight:
    """Each group's grid from weights that carry the corrections of the groups before it."""
    rounding = ColumnRounding(weight, factor)
    size = columns_per_group(len(rounding), spec.group_size)
    grids = []
    for start in range(0, len(rounding), size):
        stop = min(start + size, len(rounding))
        expected = rounding.expected(start, stop).T.contiguous()
        grid = affine.store_grid(*find_grid(expected, spec, factor.costs[start:stop]), spec)
        grids.append(grid)
        rounding.round(start, stop, StaticGrid(grid, spec, len(rounding)))
    return affine.join_grids(grids).weight(rounding.codes(), spec)


def _groups_in_order(
    weight: Tensor,
    spec: QuantSpec,
    factor: Factor,
    find_grid: _FindGrid,
    statistics: InputStatistics,
    turns: int,
) -> QuantizedWeight:
    """Groups of columns that are rounded one after the other; each column names its group."""
    order = factor.order
    position = order.argsort()
    quantized = _group_by_group(weight, spec, factor, find_grid)
    if turns:
        # In the order of rounding groups are runs of neighbours again.
        sorted_codes = replace(quantized, codes=quantized.codes[:, order])
        with statistics.damped(factor.damping) as hessian:
            permuted = hessian[order.unsqueeze(1), order]
        visits = torch.arange(len(order), device=order.device)
        quantized = refine(weight[:, order], sorted_codes, permuted, visits, turns)
        quantized = replace(quantized, codes=quantized.codes[:, position])
    groups = position // columns_per_group(len(order), spec.group_size)
    return replace(quantized, g_idx=groups.int())


def _static_groups(
    weight: Tensor, spec: QuantSpec, factor: Factor, find_grid: _FindGrid, importance: Tensor
) -> QuantizedWeight:
    """All grids from the weight as it is, before the first column is rounded."""
    grid = affine.store_grid(*find_grid(weight, spec, importance), spec)
    rounding = ColumnRounding(weight, factor)
    size = columns_per_group(len(rounding), spec.group_size)
    rounding.round(0, len(rounding), StaticGrid(grid, spec, size))
    return grid.weight(rounding.codes(), spec)


def _range_grid(
    weight: Tensor, spec: QuantSpec, importance: Tensor
) -> tuple[Tensor, Tensor | None]:
    return affine.range_grid(weight, spec)


ALGORITHMS.register("gptq", Gptq())
