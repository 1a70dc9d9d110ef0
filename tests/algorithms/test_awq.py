"""Transform ``awq``: factors that help, never hurt, and respect shared channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.algorithms import ALGORITHMS, TRANSFORMS, find_method
from hfq.core.errors import ConfigError
from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.core.statistics import InputStatistics

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]

SPECS: list[QuantSpec] = [IntSpec(bits=3), IntSpec(bits=4, sym=False), CodebookSpec(group_size=128)]


LARGE = list(range(3, 256, 32))


@pytest.fixture
def statistics(generator: torch.Generator) -> InputStatistics:
    """One of 32 channels is fifty times as large as the others."""
    x = torch.randn(500, 256, generator=generator)
    x[:, LARGE] *= 50
    return InputStatistics(tokens=500, hessian=x.T @ x / 500)


def small_where_large(weight: Tensor) -> Tensor:
    """Small weights among large ones for the large channels: a grid alone cannot be finer for them."""
    weight[:, LARGE] *= 0.3
    return weight


def factors(
    weights: list[tuple[Tensor, QuantSpec]],
    statistics: InputStatistics,
    channels: Tensor | None = None,
) -> Tensor:
    awq = TRANSFORMS.get("awq")
    return awq.factors(weights, statistics, channels, awq.options)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_large_activations_get_finer_weights(
    spec: QuantSpec, statistics: InputStatistics, random_weight: MakeWeight
) -> None:
    weight = small_where_large(random_weight(64, 256))
    found = factors([(weight, spec)], statistics)
    assert found[LARGE].min() > 2 * found.median()

    def error(by: Tensor) -> float:
        method = {"scale_search": True}
        scaled = statistics.rescaled(by)
        quantized = ALGORITHMS.get("rtn").quantize(weight * by, spec, method, scaled)
        return statistics.error(quantized.dequantize() / by - weight)

    assert error(found) < 0.5 * error(torch.ones(256))


def test_shared_channels_get_equal_factors(
    statistics: InputStatistics, random_weight: MakeWeight
) -> None:
    channels = torch.arange(128).repeat(2)
    weight = small_where_large(random_weight(64, 256))
    found = factors([(weight, IntSpec(bits=3))], statistics, channels)
    assert torch.equal(found[:128], found[128:]) and found.max() > 1.5 * found.median()


def test_weights_that_share_activations_are_weighed_together(
    statistics: InputStatistics, random_weight: MakeWeight
) -> None:
    pair = [(random_weight(32, 256), SPECS[0]), (random_weight(48, 256), SPECS[1])]
    assert factors(pair, statistics).shape == (256,)


def test_where_nothing_helps_nothing_is_done(random_weight: MakeWeight) -> None:
    nothing = InputStatistics(tokens=3, hessian=torch.zeros(256, 256))
    assert torch.equal(factors([(random_weight(8, 256), SPECS[0])], nothing), torch.ones(256))


def test_names_combine() -> None:
    alone, both = find_method("awq"), find_method("awq+gptq")
    assert (alone.transform, alone.algorithm) == ("awq", "rtn") and alone.calibrated
    assert alone.options["scale_search"] is True
    assert both.algorithm == "gptq" and {"awq_steps", "damp_percent"} <= both.options.keys()
    with pytest.raises(LookupError, match="Did you mean 'gptq'"):
        find_method("awq+gtpq")
    with pytest.raises(LookupError, match="expected one of awq, gptq"):
        find_method("qwa")


@pytest.mark.parametrize("steps", [0, True, 2.5])
def test_steps_are_checked(steps: object) -> None:
    with pytest.raises(ConfigError, match="awq_steps must be a positive integer"):
        find_method("awq").check(IntSpec(), {**find_method("awq").options, "awq_steps": steps})
