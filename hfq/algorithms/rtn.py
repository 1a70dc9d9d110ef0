"""``rtn``: round to nearest. Needs no data.

With ``scale_search`` each group gets the grid with the least squared error instead of the one that covers its range
(`hfq.core.fit`); zero points become fractional then. Errors count by the mean squared activation of their column where
statistics are at hand. With ``double_quant`` the scales found are rounded once more, to
8 bits, after the search.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core import affine
from ..core.checks import check_flag
from ..core.errors import ConfigError
from ..core.fit import fit_grid
from ..core.spec import Fp8Spec, QuantSpec
from ..core.statistics import InputStatistics
from ..core.weight import QuantizedWeight
from . import ALGORITHMS


class RoundToNearest:
    """Round every weight to the nearest point of a grid that covers (or nearly covers) its group."""

    calibrated = False
    orders_columns = False
    defaults: Mapping[str, object] = {"format": "int"}
    options: Mapping[str, object] = {"scale_search": False}

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        check_flag("scale_search", options["scale_search"])
        if options["scale_search"] and isinstance(spec, Fp8Spec):
            raise ConfigError(
                "scale_search=True looks for a grid of even steps or of 16 values, which format 'fp8' has not: its steps "
                "follow the size of each weight; leave scale_search out"
            )

    def quantize(
        self,
        weight: Tensor,
        spec: QuantSpec,
        options: Mapping[str, object],
        statistics: InputStatistics | None = None,
    ) -> QuantizedWeight:
        if options["scale_search"]:
            importance = None if statistics is None else statistics.importance
            weight = weight.float()
            return affine.encode(weight, *fit_grid(weight, spec, importance), spec)
        return affine.encode(weight, *affine.range_grid(weight, spec), spec)


ALGORITHMS.register("rtn", RoundToNearest())
