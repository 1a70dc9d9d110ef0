"""Transform ``smoothquant``: the paper's factors, the search for their strength, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.algorithms import TRANSFORMS, find_method
from hfq.algorithms.smoothquant import smoothing_factors
from hfq.core import affine
from hfq.core.activations import rounded_tokens
from hfq.core.errors import CalibrationError, ConfigError
from hfq.core.spec import Int8Spec, IntSpec, QuantSpec
from hfq.core.statistics import InputStatistics

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]

OUTLIERS = [3, 70, 200]
DYNAMIC, STATIC = Int8Spec(activation="dynamic"), Int8Spec(activation="static")


def known(x: Tensor) -> InputStatistics:
    return InputStatistics(
        tokens=len(x), hessian=x.T @ x / len(x), largest=x.abs().amax(0), sample=x
    )


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    """Three of 256 channels are eighty times as large as the others."""
    x = torch.randn(200, 256, generator=generator)
    x[:, OUTLIERS] *= 80
    return x


def factors(
    weights: list[tuple[Tensor, QuantSpec]],
    statistics: InputStatistics,
    channels: Tensor | None = None,
    smoothing: object = "search",
) -> Tensor:
    transform = TRANSFORMS.get("smoothquant")
    return transform.factors(weights, statistics, channels, {"smoothing": smoothing})


def error(weight: Tensor, x: Tensor, by: Tensor) -> float:
    """Of the layer's output when both are rescaled and quantized."""
    scaled = weight * by
    rounded = affine.encode(scaled, *affine.range_grid(scaled, DYNAMIC), DYNAMIC).dequantize()
    return float((rounded_tokens(x / by) @ rounded.T - x @ weight.T).square().sum())


def test_factors_are_those_of_the_paper(x: Tensor, random_weight: MakeWeight) -> None:
    first, second = random_weight(40, 256), random_weight(24, 256)
    found = factors([(first, DYNAMIC), (second, DYNAMIC)], known(x), smoothing=0.75)
    largest = torch.cat([first, second]).abs().amax(0)
    torch.testing.assert_close(found, x.abs().amax(0) ** 0.75 / largest**0.25)


@pytest.mark.parametrize("spec", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_outliers_move_into_the_weights(
    spec: QuantSpec, x: Tensor, random_weight: MakeWeight
) -> None:
    weight = random_weight(64, 256)
    found = factors([(weight, spec)], known(x))
    assert found[OUTLIERS].min() > 5 * found.median()
    assert error(weight, x, found) < 0.1 * error(weight, x, torch.ones(256))


def test_the_search_is_not_worse_than_any_fixed_strength(
    x: Tensor, random_weight: MakeWeight
) -> None:
    weight = random_weight(64, 256)
    least = error(weight, x, factors([(weight, DYNAMIC)], known(x)))
    for smoothing in (0, 0.25, 0.5, 0.75, 1):
        fixed = factors([(weight, DYNAMIC)], known(x), smoothing=smoothing)
        assert least <= error(weight, x, fixed) * 1.0001


def test_where_nothing_is_lost_nothing_is_done() -> None:
    even = torch.ones(50, 256)
    even[:, ::2] = -1.0
    weight = torch.ones(8, 256)
    assert torch.equal(factors([(weight, DYNAMIC)], known(even)), torch.ones(256))


def test_shared_channels_get_equal_factors(x: Tensor, random_weight: MakeWeight) -> None:
    channels = torch.arange(128).repeat_interleave(2)
    for smoothing in ("search", 0.5):
        found = factors([(random_weight(64, 256), DYNAMIC)], known(x), channels, smoothing)
        assert torch.equal(found[::2], found[1::2]) and found.max() > 5 * found.median()


def test_channels_that_carry_nothing_stay_as_they_are(x: Tensor, random_weight: MakeWeight) -> None:
    weight = random_weight(64, 256)
    x[:, 7], weight[:, 9] = 0.0, 0.0
    for smoothing in ("search", 0, 0.5, 1):
        found = factors([(weight, DYNAMIC)], known(x), smoothing=smoothing)
        assert found[7] == 1 and found[9] == 1 and bool(found.isfinite().all())
    assert smoothing_factors(torch.zeros(3), torch.ones(3), 0.0).tolist() == [1.0, 1.0, 1.0]


def test_statistics_without_a_sample_are_refused(random_weight: MakeWeight) -> None:
    bare = InputStatistics(tokens=3, hessian=torch.eye(256))
    with pytest.raises(CalibrationError, match="needs the activations' magnitudes"):
        factors([(random_weight(8, 256), DYNAMIC)], bare)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(
    value: float, x: Tensor, random_weight: MakeWeight
) -> None:
    x[3, 5] = value
    with pytest.raises(CalibrationError, match="the activations that this weight reads are NaN or"):
        factors([(random_weight(8, 256), DYNAMIC)], known(x))


def test_names_combine() -> None:
    alone, both = find_method("smoothquant"), find_method("smoothquant+gptq")
    assert (alone.transform, alone.algorithm, alone.calibrated) == ("smoothquant", "rtn", True)
    assert alone.sampled and both.sampled and not find_method("awq").sampled
    assert dict(alone.defaults) == {"format": "int8", "activation": "dynamic"}
    assert both.defaults == alone.defaults
    assert {"smoothing", "damp_percent"} <= both.options.keys()


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, True, "0.5", "auto", None])
def test_the_strength_is_checked(smoothing: object) -> None:
    with pytest.raises(ConfigError, match="smoothing must be 'search' or a number from 0 to 1"):
        find_method("smoothquant").check(
            DYNAMIC, {**find_method("smoothquant").options, "smoothing": smoothing}
        )


@pytest.mark.parametrize("spec", [Int8Spec(), IntSpec()], ids=str)
def test_float_activations_are_refused(spec: QuantSpec) -> None:
    with pytest.raises(
        ConfigError, match="needs format 'int8' or 'fp8' with activation='dynamic' or 's"
    ):
        find_method("smoothquant").check(spec, find_method("smoothquant").options)
