"""How codes and scales are chosen, one file per method. Imports `hfq.core` only.

An algorithm takes a float32 weight `[N, K]` and a spec, a calibrated one also statistics of the inputs, and returns
a `QuantizedWeight`; nothing after it rounds again. Rows are independent of each other, so a caller may hand over any
slice of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..core.registry import Registry
from ..core.spec import QuantSpec
from ..core.statistics import InputStatistics
from ..core.weight import QuantizedWeight

__all__ = ["ALGORITHMS", "Algorithm"]


class Algorithm(Protocol):
    """One quantization method.

    Attributes:
        calibrated: the method cannot do without statistics.
        defaults: settings that the method prefers where the user names none ("format", "sym", ...).
        options: the method's own settings with their defaults; `HfqConfig` accepts them by these names.
    """

    calibrated: bool
    defaults: Mapping[str, object]
    options: Mapping[str, object]

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        """`ConfigError` where the method cannot produce that spec or an option is out of range."""

    def quantize(
        self,
        weight: Tensor,
        spec: QuantSpec,
        options: Mapping[str, object],
        statistics: InputStatistics | None = None,
    ) -> QuantizedWeight:
        """Quantize float32 `[N, K]`; deterministic.

        Raises:
            WeightError: NaN or infinite values.
            CalibrationError: the method is calibrated and there are no statistics, or none of use.
        """


ALGORITHMS: Registry[Algorithm] = Registry("method", __name__)
