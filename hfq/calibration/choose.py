"""Choosing the codes of one weight by what is known about its inputs, and what they cost."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..algorithms import ALGORITHMS, find_method
from ..config import Recipe
from ..core.activations import fit_input_scale, rounded_tokens
from ..core.errors import CalibrationError, HfqError
from ..core.spec import activation_dtype
from ..core.statistics import InputStatistics
from ..core.weight import QuantizedWeight

__all__ = ["choose_codes", "relative_error"]

# Rows of a weight that its error is measured on.
_ERROR_ROWS = 256


def choose_codes(
    name: str, weight: Tensor, recipe: Recipe, statistics: InputStatistics | None
) -> tuple[QuantizedWeight, str]:
    """Codes for float32 `[N, K]`, and the method that chose them.

    A weight that has seen nothing (a layer that never ran) is rounded to nearest on the best grid.
    """
    method, algorithm, options = (
        recipe.method,
        find_method(recipe.method).algorithm,
        recipe.options,
    )
    if statistics is None and ALGORITHMS.get(algorithm).calibrated:
        method = algorithm = "rtn"
        options = {"scale_search": True}
    try:
        if statistics is not None:
            statistics.check_finite()
        quantized = ALGORITHMS.get(algorithm).quantize(weight, recipe.spec, options, statistics)
        if recipe.spec.activation == "static":
            scale = _input_scale(weight, quantized, statistics)
            quantized = replace(quantized, input_scale=scale)
    except HfqError as error:
        raise type(error)(f"{name}: {error}") from error
    return quantized, method


def _input_scale(
    weight: Tensor, quantized: QuantizedWeight, statistics: InputStatistics | None
) -> Tensor:
    """The static scale of what a weight reads, float32 `[1]`.

    Raises:
        CalibrationError: it has seen nothing.
    """
    if statistics is None or statistics.sample is None:
        raise CalibrationError(
            "this weight never ran on the calibration data, so that no static scale of its activations can be found: "
            "give data that it reads, or use activation='dynamic' for it (overrides)"
        )
    rows = slice(None, None, max(1, len(weight) // _ERROR_ROWS))
    return fit_input_scale(
        statistics.sample,
        weight[rows],
        quantized.dequantize()[rows],
        activation_dtype(quantized.spec),
    )


def relative_error(
    weight: Tensor, quantized: QuantizedWeight, statistics: InputStatistics | None
) -> float | None:
    """Squared error of the output over the squared output, on some of the rows.

    With quantized activations on some of the tokens, where those were kept; else it is that of the weight alone.
    """
    if statistics is None or not weight.numel():
        return None
    step = max(1, len(weight) // _ERROR_ROWS)
    rows, rounded = weight[::step], quantized.dequantize()[::step]
    if quantized.spec.activation is not None and statistics.sample is not None:
        x = statistics.sample.float()
        wanted = x @ rows.T
        whole = float(wanted.square().sum())
        read = rounded_tokens(x, quantized.input_scale, activation_dtype(quantized.spec))
        found = read @ rounded.T
        wrong = float((found - wanted).square().sum())
    else:
        whole, wrong = statistics.error(rows), statistics.error(rounded - rows)
    return wrong / whole if whole else 0.0
