"""How codes and scales are chosen, one file per method. Imports `hfq.core` only.

A method is an algorithm ("gptq"), a transform that an algorithm follows ("awq"), or both by name ("awq+gptq").

An algorithm takes a float32 weight `[N, K]` (one that is not calibrated, of any float dtype) and a spec, a calibrated one
also statistics of the inputs, and returns a `QuantizedWeight`; nothing after it rounds again. Rows are independent of
each other, so a caller may hand over any slice of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..core.errors import ConfigError, UnknownNameError, nearest
from ..core.registry import Registry
from ..core.spec import QuantSpec
from ..core.statistics import InputStatistics
from ..core.weight import QuantizedWeight

__all__ = [
    "ALGORITHMS",
    "TRANSFORMS",
    "Algorithm",
    "Method",
    "Transform",
    "find_method",
    "method_names",
]


class Algorithm(Protocol):
    """One quantization method.

    Attributes:
        calibrated: the method cannot do without statistics.
        orders_columns: groups may follow an order of its own (`IntSpec.static_groups` False).
        defaults: settings that the method prefers where the user names none ("format", "sym", ...).
        options: the method's own settings with their defaults; `HfqConfig` accepts them by these names.
    """

    calibrated: bool
    orders_columns: bool
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


class Transform(Protocol):
    """A rescaling of activations that an algorithm follows: ``awq``, or with another algorithm ``awq+gptq``.

    Attributes:
        sampled: the transform needs some of the activations themselves (`InputStatistics.sample`).
        defaults: settings that it prefers where the user names none, before those of the algorithm.
        follows: the algorithm that follows where the user names none.
        follows_with: options of that algorithm that suit the transform.
        options: the transform's own settings with their defaults.
    """

    sampled: bool
    defaults: Mapping[str, object]
    follows: str
    follows_with: Mapping[str, object]
    options: Mapping[str, object]

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        """`ConfigError` where the transform does nothing for that spec or an option is out of range."""

    def factors(
        self,
        weights: Sequence[tuple[Tensor, QuantSpec]],
        statistics: InputStatistics,
        channels: Tensor | None,
        options: Mapping[str, object],
    ) -> Tensor:
        """What to multiply columns with, and to divide the activations by: float32 `[K]`, above 0.

        Args:
            weights: float32 `[N, K]` that read the same activations, and how they will be stored.
            statistics: of the activations.
            channels: int64 `[K]`, columns of equal numbers must get equal factors; None: all are free.
        """


ALGORITHMS: Registry[Algorithm] = Registry("method", __name__)
TRANSFORMS: Registry[Transform] = Registry("method", __name__)


@dataclass(frozen=True)
class Method:
    """What a user names: an algorithm, and the transform before it if there is one."""

    transform: str | None
    algorithm: str

    @property
    def calibrated(self) -> bool:
        """Whether it needs statistics of the activations."""
        return self.transform is not None or ALGORITHMS.get(self.algorithm).calibrated

    @property
    def sampled(self) -> bool:
        """Whether it needs some of the activations themselves."""
        return self.transform is not None and TRANSFORMS.get(self.transform).sampled

    @property
    def defaults(self) -> Mapping[str, object]:
        """Settings that it prefers where the user names none."""
        defaults = dict(ALGORITHMS.get(self.algorithm).defaults)
        if self.transform is not None:
            defaults.update(TRANSFORMS.get(self.transform).defaults)
        return defaults

    @property
    def options(self) -> dict[str, object]:
        """All settings of its own with their defaults."""
        options = dict(ALGORITHMS.get(self.algorithm).options)
        if self.transform is not None:
            transform = TRANSFORMS.get(self.transform)
            if transform.follows == self.algorithm:
                options |= transform.follows_with
            options |= transform.options
        return options

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        """`ConfigError` where it cannot produce that spec or an option is out of range."""
        if not spec.static_groups and not ALGORITHMS.get(self.algorithm).orders_columns:
            raise ConfigError(
                f"static_groups=False stores groups that follow gptq's order of rounding: method {self.algorithm!r} has "
                "no order; set static_groups=True, or use method 'gptq'"
            )
        if self.transform is not None:
            TRANSFORMS.get(self.transform).check(spec, options)
        ALGORITHMS.get(self.algorithm).check(spec, options)


def find_method(name: str) -> Method:
    """``"awq+gptq"`` -> transform and algorithm; "awq" alone -> with the algorithm that it brings along.

    Raises:
        UnknownNameError: not a method.
    """
    first, plus, second = str(name).partition("+")
    if plus:
        TRANSFORMS.get(first)
        ALGORITHMS.get(second)
        return Method(first, second)
    if first in TRANSFORMS.names():
        return Method(first, TRANSFORMS.get(first).follows)
    if first not in ALGORITHMS.names():
        names = method_names()
        raise UnknownNameError(
            f"unknown method {name!r}: expected one of {', '.join(names)}.{nearest(str(name), names)}"
        )
    return Method(None, first)


def method_names() -> list[str]:
    """All names that stand alone, sorted."""
    return sorted([*ALGORITHMS.names(), *TRANSFORMS.names()])
