"""``smoothquant``: difficulty moves from activations to weights before both are quantized to 8 bits.

Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022. A few channels of the activations are many times larger than the others, so that a scale for the
whole token leaves the others a handful of steps. Channel j is divided by

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)                        (equation 4)

and the columns that read it are multiplied by it, for all weights that read the same activations. The division hides in
the norm or the layer before. Option:

    smoothing   alpha, from 0 to 1 (the paper: 0.5), or "search" (default): for each site the one with the least squared
                error of the product of quantized activations and quantized weights, on the kept sample of the
                calibration tokens; no smoothing at all where that is best
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import affine
from ..core.activations import rounded_tokens, widest_input_scale
from ..core.errors import CalibrationError, ConfigError
from ..core.spec import QuantSpec, activation_dtype
from ..core.statistics import InputStatistics
from . import TRANSFORMS

# Rows of each weight that the error is measured on.
_ROWS = 128

# Alpha is searched in steps of a twentieth.
_STEPS = 20


class SmoothQuant:
    """Per-channel factors that even out activations at the cost of the weights."""

    sampled = True
    defaults: Mapping[str, object] = {"format": "int8", "activation": "dynamic"}
    follows = "rtn"
    follows_with: Mapping[str, object] = {}
    options: Mapping[str, object] = {"smoothing": "search"}

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        smoothing = options["smoothing"]
        number = isinstance(smoothing, (int, float)) and not isinstance(smoothing, bool)
        if smoothing != "search" and not (number and 0 <= _number(smoothing) <= 1):
            raise ConfigError(
                f"smoothing must be 'search' or a number from 0 to 1, got {smoothing!r}"
            )
        if spec.activation is None:
            raise ConfigError(
                "method 'smoothquant' is for quantized activations: it needs format 'int8' or 'fp8' with "
                f"activation='dynamic' or 'static', got {spec}; use method 'awq' or 'gptq' where activations stay in float"
            )

    def factors(
        self,
        weights: Sequence[tuple[Tensor, QuantSpec]],
        statistics: InputStatistics,
        channels: Tensor | None,
        options: Mapping[str, object],
    ) -> Tensor:
        if statistics.largest is None or statistics.sample is None:
            raise CalibrationError(
                "method 'smoothquant' needs the activations' magnitudes: give calibration data (dataset=...)"
            )
        statistics.check_finite()
        activations = _shared(statistics.largest, channels)
        columns = torch.stack([weight.abs().amax(0) for weight, _ in weights]).amax(0)
        columns = _shared(columns, channels)
        if options["smoothing"] != "search":
            return smoothing_factors(activations, columns, _number(options["smoothing"]))
        some = [(weight[:: max(1, len(weight) // _ROWS)], spec) for weight, spec in weights]
        best = torch.ones_like(activations)
        least = _error(some, best, statistics.sample)
        for step in range(_STEPS + 1):
            trial = smoothing_factors(activations, columns, step / _STEPS)
            error = _error(some, trial, statistics.sample)
            if error < least:
                best, least = trial, error
        return best


def smoothing_factors(activations: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Equation 4 of the paper; 1 for channels that carry nothing or that nothing reads.

    Args:
        activations, columns: largest magnitudes of each channel of the activations and of the weights, float32 `[K]`.
    """
    factors = activations.pow(alpha) / columns.pow(1 - alpha)
    usable = factors.isfinite() & (activations > 0) & (columns > 0)
    return torch.where(usable, factors.clamp(1e-5, 1e5), 1.0)


def _number(smoothing: object) -> float:
    assert isinstance(smoothing, (int, float))
    return float(smoothing)


def _shared(largest: Tensor, channels: Tensor | None) -> Tensor:
    """One value for all columns that come from one channel of the producer: their largest."""
    if channels is None:
        return largest
    found = largest.new_zeros(int(channels.max()) + 1)
    return found.scatter_reduce_(0, channels, largest, "amax")[channels]


def _error(weights: Sequence[tuple[Tensor, QuantSpec]], factors: Tensor, sample: Tensor) -> float:
    """Squared error of the outputs on the sample when activations and weights are rescaled and quantized."""
    x = sample.float()
    smooth = x / factors
    total = 0.0
    for weight, spec in weights:
        scaled = weight * factors
        rounded = affine.encode(scaled, *affine.range_grid(scaled, spec), spec).dequantize()
        dtype = activation_dtype(spec)
        scale = widest_input_scale(smooth, dtype) if spec.activation == "static" else None
        found = rounded_tokens(smooth, scale, dtype) @ rounded.T
        total += float((found - x @ weight.T).square().sum())
    return total


TRANSFORMS.register("smoothquant", SmoothQuant())
