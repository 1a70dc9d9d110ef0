"""``awq``: activation-aware scaling. Columns that read large activations are multiplied before rounding, which makes
their relative error smaller; the activations are divided by the same factors where that costs nothing.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023. For the activations'
root mean square a and the weights' mean magnitude w of each channel the factors are tried along

    s = a^alpha                     and           s = a^alpha / w^(1 - alpha),           alpha = 0, 0.05, ... 1

and the best for the squared error of the outputs is kept. The error is exact for the calibration tokens: it is the
quadratic form of their second moment (`hfq.core.statistics`), so that no activations are kept and nothing is run.
Clipping, the second half of the paper, is the search for least squares grids that follows (`hfq.core.fit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..core import affine
from ..core.errors import ConfigError
from ..core.fit import fit_grid
from ..core.spec import Fp8Spec, QuantSpec
from ..core.statistics import InputStatistics
from . import TRANSFORMS

# Rows of each weight that the error is measured on.
_ROWS = 128


class ActivationAware:
    """Per-channel factors that minimise the error of what reads the channels."""

    sampled = False
    defaults: Mapping[str, object] = {}
    follows = "rtn"
    follows_with: Mapping[str, object] = {"scale_search": True}
    options: Mapping[str, object] = {"awq_steps": 20}

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        steps = options["awq_steps"]
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"awq_steps must be a positive integer, got {steps!r}")
        if isinstance(spec, Fp8Spec):
            raise ConfigError(
                "method 'awq' makes the errors of some columns smaller by making their weights larger, and those of format "
                "'fp8' grow alike: use method 'rtn', or 'smoothquant' where activations are rounded, too"
            )

    def factors(
        self,
        weights: Sequence[tuple[Tensor, QuantSpec]],
        statistics: InputStatistics,
        channels: Tensor | None,
        options: Mapping[str, object],
    ) -> Tensor:
        steps = options["awq_steps"]
        assert isinstance(steps, int)
        some = [(weight[:: max(1, len(weight) // _ROWS)], spec) for weight, spec in weights]
        best = torch.ones(statistics.hessian.shape[0], device=statistics.hessian.device)
        least = _error(some, best, statistics)
        for trial in _trials(some, statistics, channels, steps):
            error = _error(some, trial, statistics)
            if error < least:
                best, least = trial, error
        return best


def _trials(
    weights: Sequence[tuple[Tensor, QuantSpec]],
    statistics: InputStatistics,
    channels: Tensor | None,
    steps: int,
) -> Iterator[Tensor]:
    activations = _shared(statistics.importance, channels).sqrt()
    magnitudes = _shared(
        torch.cat([weight.abs() for weight, _ in weights]).mean(0).square(), channels
    ).sqrt()
    for step in range(1, steps + 1):
        alpha = step / steps
        yield _normalised(activations.pow(alpha))
        yield _normalised(activations.pow(alpha) / magnitudes.pow(1 - alpha))


def _shared(squares: Tensor, channels: Tensor | None) -> Tensor:
    """One value for all columns that come from one channel of the producer: their mean."""
    if channels is None:
        return squares
    count = int(channels.max()) + 1
    sums = squares.new_zeros(count).index_add_(0, channels, squares)
    members = squares.new_zeros(count).index_add_(0, channels, torch.ones_like(squares))
    return (sums / members.clamp(min=1))[channels]


def _normalised(factors: Tensor) -> Tensor:
    """Geometric middle of the range at 1; channels that are never used stay as they are."""
    usable = factors.isfinite() & (factors > 0)
    if not bool(usable.any()):
        return torch.ones_like(factors)
    low, high = factors[usable].min(), factors[usable].max()
    scaled = factors / (low * high).sqrt()
    return torch.where(usable, scaled.clamp(1e-4, 1e4), torch.ones_like(factors))


def _error(
    weights: Sequence[tuple[Tensor, QuantSpec]], factors: Tensor, statistics: InputStatistics
) -> float:
    """Squared error of the outputs when the weights are multiplied by the factors, rounded, and divided again."""
    importance = statistics.importance / factors.square()
    total = 0.0
    for weight, spec in weights:
        scaled = weight * factors
        rounded = affine.encode(scaled, *fit_grid(scaled, spec, importance), spec).dequantize()
        total += statistics.error(rounded / factors - weight)
    return total


TRANSFORMS.register("awq", ActivationAware())
