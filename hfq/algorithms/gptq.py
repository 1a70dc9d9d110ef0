"""``gptq``: rounding column by column, each column answering for the errors of those before it.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022; the equations are in `hfq.core.statistics.Factor`. Options:

    damp_percent   added to the diagonal of the inputs' second moment, as a share of its mean
    desc_act       columns with the largest activations first ("act-order"): they are rounded before errors pile up
    scale_search   grids with the least squared error (`hfq.core.fit`) instead of those that cover the range
    refine         how often grids and codes are chosen again afterwards, all others known (`hfq.core.refine`)
    gptaq          0 to 1: which share of the drift of the inputs is made good. The layers before are quantized, so
                   this one reads x instead of the float model's x'; its best float weight for that is

                       W + gptaq * W D (H + damping)^-1        D = mean of (x' - x) x^T

                   (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025, in
                   closed form: rounding then starts from that weight)

Grids are chosen when the first column of their group comes up, from weights that carry the corrections so far. With
`desc_act`, and where scales are quantized themselves, all grids are chosen before the first column ("static groups"),
so that groups stay runs of neighbours and reading the weight costs nothing extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core import affine
from ..core.errors import CalibrationError, ConfigError
from ..core.fit import fit_grid
from ..core.refine import refine
from ..core.spec import CodebookSpec, QuantSpec
from ..core.statistics import Factor, InputStatistics
from ..core.weight import QuantizedWeight
from . import ALGORITHMS

# One column of corrected weights to (codes, rounded weights); see `affine.column_rounder`.
_Rounder = Callable[[Tensor], tuple[Tensor, Tensor]]

# Columns that are corrected one by one; those further on get the sum of a block's corrections as one product.
_BLOCK = 128


class Gptq:
    """Second-order rounding with calibrated inputs."""

    calibrated = True
    defaults: Mapping[str, object] = {"format": "int"}
    options: Mapping[str, object] = {
        "damp_percent": 0.01,
        "desc_act": True,
        "scale_search": True,
        "refine": 2,
        "gptaq": 0.0,
    }

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        for name in ("desc_act", "scale_search"):
            if not isinstance(options[name], bool):
                raise ConfigError(f"{name} must be True or False, got {options[name]!r}")
        turns = options["refine"]
        if not isinstance(turns, int) or isinstance(turns, bool) or turns < 0:
            raise ConfigError(f"refine must be an integer of at least 0, got {turns!r}")
        for name in ("damp_percent", "gptaq"):
            value = options[name]
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise ConfigError(f"{name} must be a number from 0 to 1, got {value!r}")

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
        damp_percent, gptaq, turns = (options[key] for key in ("damp_percent", "gptaq", "refine"))
        assert isinstance(damp_percent, (int, float)) and isinstance(gptaq, (int, float))
        assert isinstance(turns, int)
        factor = statistics.factor(float(damp_percent), bool(options["desc_act"]))
        if gptaq and statistics.drift is not None:
            weight = weight + gptaq * _drift_correction(weight, statistics.drift, factor)
        rounding = _Rounding(weight, spec, factor, search=bool(options["scale_search"]))
        if options["desc_act"] or (isinstance(spec, CodebookSpec) and spec.double_quant):
            quantized = rounding.with_grids(statistics.importance)
        else:
            quantized = rounding.group_by_group()
        if not turns:
            return quantized
        return refine(weight, quantized, statistics.damped(factor.damping), factor.order, turns)


def _drift_correction(weight: Tensor, drift: Tensor, factor: Factor) -> Tensor:
    """W D (H + damping)^-1, `[N, K]`."""
    upper = factor.feedback * factor.costs.sqrt()
    rows = (weight @ drift)[:, factor.order]
    rows = torch.linalg.solve_triangular(upper.T, rows, upper=False, left=False)
    rows = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
    return torch.empty_like(weight).index_copy_(1, factor.order, rows)


class _Rounding:
    """One weight on its way to codes. Columns lie in rows here, so that each is one run of memory.

    Attributes:
        columns: the weight in the order of rounding, float32 `[K, N]`.
        errors: w - q of the columns that are done, float32 `[K, N]`.
        codes: uint8 `[K, N]`.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, factor: Factor, search: bool) -> None:
        self.weight, self.spec, self.factor = weight, spec, factor
        self.find_grid = fit_grid if search else _range_grid
        self.columns = weight[:, factor.order].T.contiguous()
        self.errors = torch.empty_like(self.columns)
        self.codes = torch.empty(self.columns.shape, dtype=torch.uint8, device=weight.device)

    def group_by_group(self) -> QuantizedWeight:
        """Each group's grid from weights that carry the corrections of the groups before it."""
        count = len(self.columns)
        size = count if self.spec.group_size == -1 else self.spec.group_size
        grids = []
        for start in range(0, count, size):
            stop = min(start + size, count)
            expected = self._expected(start, stop).T.contiguous()
            costs = self.factor.costs[start:stop]
            grid = affine.store_grid(*self.find_grid(expected, self.spec, costs), self.spec)
            grids.append(grid)
            rounder = affine.column_rounder(
                grid.scales[:, 0].float(),
                None if grid.float_zeros is None else grid.float_zeros[:, 0],
                self.spec,
            )
            for first in range(start, stop, _BLOCK):
                self._round_block(first, [rounder] * (min(first + _BLOCK, stop) - first))
        return self._finished(affine.join_grids(grids))

    def with_grids(self, importance: Tensor) -> QuantizedWeight:
        """All grids from the weight as it is, before the first column is rounded."""
        grid = affine.store_grid(*self.find_grid(self.weight, self.spec, importance), self.spec)
        scales = grid.scales.float().T.contiguous()
        zeros = None if grid.float_zeros is None else grid.float_zeros.T.contiguous()
        rounders = affine.group_rounders(scales, zeros, self.spec)
        size = self.spec.group_size
        groups = [0 if size == -1 else column // size for column in self.factor.order.tolist()]
        for first in range(0, len(groups), _BLOCK):
            self._round_block(first, [rounders[g] for g in groups[first : first + _BLOCK]])
        return self._finished(grid)

    def _corrections(self, first: int, last: int) -> Tensor:
        """What columns before `first` ask of the columns from `first` to `last`: `[last - first, N]`."""
        corrections: Tensor = self.factor.feedback[:first, first:last].T @ self.errors[:first]
        return corrections

    def _expected(self, first: int, last: int) -> Tensor:
        """What columns would be rounded from if rounding them made no errors: `[last - first, N]`.

        A column that takes its correction differs from the weight by it, and passes that on like any error.
        """
        among = self.factor.feedback[first:last, first:last].T
        taken: Tensor = torch.linalg.solve_triangular(
            among, self._corrections(first, last), upper=False, unitriangular=True
        )
        return self.columns[first:last] + taken

    def _round_block(self, first: int, rounders: list[_Rounder]) -> None:
        """Round neighbouring columns from `first` on, each correcting the ones after it."""
        last = first + len(rounders)
        block = self.columns[first:last] + self._corrections(first, last)
        for index, rounder in enumerate(rounders):
            column = first + index
            codes, rounded = rounder(block[index])
            self.codes[column] = codes
            torch.sub(self.columns[column], rounded, out=self.errors[column])
            block[index + 1 :].addr_(
                self.factor.feedback[column, column + 1 : last], self.errors[column]
            )

    def _finished(self, grid: affine.StoredGrid) -> QuantizedWeight:
        codes = torch.empty_like(self.codes).index_copy_(0, self.factor.order, self.codes)
        return grid.weight(codes.T.contiguous(), self.spec)


def _range_grid(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return affine.range_grid(weight, spec)


ALGORITHMS.register("gptq", Gptq())
