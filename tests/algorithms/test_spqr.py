"""Method ``spqr``: which weights become outliers, what they and bilevel grids gain, and no crash on poor data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.algorithms import ALGORITHMS, spqr
from hfq.core.errors import CalibrationError, ConfigError, WeightError
from hfq.core.spec import IntSpec, QuantSpec, SpqrSpec, outlier_count
from hfq.core.statistics import InputStatistics
from hfq.core.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]
COLUMNS = 150  # one block and a bit, a short last group


def quantize(
    weight: Tensor, spec: QuantSpec, statistics: InputStatistics | None, **options: Any
) -> QuantizedWeight:
    method = ALGORITHMS.get("spqr" if isinstance(spec, SpqrSpec) else "gptq")
    settings = {**method.options, **options}
    method.check(spec, settings)
    return method.quantize(weight, spec, settings, statistics)


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    """Correlated activations `[T, K]` of very different sizes."""
    mixed = torch.eye(COLUMNS) + 0.1 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    scale = torch.rand(COLUMNS, generator=generator).square() * 3
    return torch.randn(600, COLUMNS, generator=generator) @ mixed * scale


def statistics_of(inputs: Tensor) -> InputStatistics:
    return InputStatistics(tokens=len(inputs), hessian=inputs.T @ inputs / len(inputs))


def test_outliers_are_stored_exactly_and_counted(inputs: Tensor, random_weight: MakeWeight) -> None:
    """A few huge weights become outliers, and the rest is as good as without them."""
    weight, known, spec = random_weight(70, COLUMNS), statistics_of(inputs), SpqrSpec(outliers=0.01)
    spiky = weight.clone()
    places = (torch.tensor([3, 3, 40, 69]), torch.tensor([7, 90, 149, 0]))
    spiky[places] = torch.tensor([2.0, -3.0, 1.5, 2.5])
    result = quantize(spiky, spec, known)
    assert result.outliers is not None
    assert len(result.outliers.values) == outlier_count(spec, 70, COLUMNS)
    assert int(result.outliers.counts.sum()) == len(result.outliers.values)
    found = torch.zeros(70, COLUMNS)
    result.outliers.add_to(found)
    assert bool((found[places] != 0).all())
    error = known.error(result.dequantize() - spiky)
    plain = quantize(weight, spec, known)
    assert error < 1.3 * known.error(plain.dequantize() - weight)
    without = quantize(spiky, SpqrSpec(outliers=0), known)
    assert error < 0.7 * known.error(without.dequantize() - spiky)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("desc_act", [False, True])
def test_it_beats_gptq_at_the_same_size(
    bits: int, desc_act: bool, inputs: Tensor, heavy_tailed_weight: MakeWeight
) -> None:
    """Groups of 64 with float16 scales and zero points take 0.5 bits, bilevel groups of 16 without outliers 0.44."""
    weight, known = heavy_tailed_weight(128, COLUMNS), statistics_of(inputs)
    ours = quantize(weight, SpqrSpec(bits=bits, outliers=0), known, desc_act=desc_act)
    gptq = IntSpec(bits=bits, group_size=64, sym=False)
    theirs = quantize(weight, gptq, known, desc_act=desc_act)
    errors = [known.error(each.dequantize() - weight) for each in (ours, theirs)]
    assert errors[0] < 0.8 * errors[1]


def test_more_outliers_are_better(inputs: Tensor, heavy_tailed_weight: MakeWeight) -> None:
    weight, known = heavy_tailed_weight(64, COLUMNS), statistics_of(inputs)
    errors = [
        known.error(quantize(weight, SpqrSpec(outliers=share), known).dequantize() - weight)
        for share in (0.0, 0.01, 0.05)
    ]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.02])
def test_a_second_look_takes_some_of_the_error(
    bits: int, share: float, inputs: Tensor, heavy_tailed_weight: MakeWeight
) -> None:
    """On the grid and with the outliers of the first: no row gets worse."""
    weight, known = heavy_tailed_weight(70, COLUMNS), statistics_of(inputs)
    spec = SpqrSpec(bits=bits, outliers=share)
    found = [quantize(weight, spec, known, refine=turns) for turns in (0, 1, 2)]
    with known.damped(known.damping) as damped:
        hessian = damped.double()
    errors = []
    for each in found:
        difference = (weight - each.dequantize()).double()
        errors.append((difference @ hessian * difference).sum(1))
        assert torch.equal(each.scales, found[0].scales)
        assert each.zeros is not None and torch.equal(each.zeros, found[0].zeros)  # type: ignore[arg-type]
        assert each.outliers is not None and found[0].outliers is not None
        assert torch.equal(each.outliers.columns, found[0].outliers.columns)
    assert bool((errors[1] <= 1.001 * errors[0]).all() and (errors[2] <= 1.001 * errors[1]).all())
    assert errors[2].sum() < 0.97 * errors[0].sum()


def test_leaving_one_out_is_what_it_says(generator: torch.Generator) -> None:
    """Against the definition: each weight left out in turn, its group on the range of the rest."""
    spec = SpqrSpec(bits=3, group_size=8)
    weight = torch.randn(5, 16, generator=generator)
    costs = torch.rand(16, generator=generator) + 0.1

    def error(values: Tensor, counts: Tensor) -> float:
        low, high = values.min(), values.max()
        codes = ((values - low) / (high - low) * 7).round()
        return float(((values - low - codes * (high - low) / 7).square() * counts).sum())

    gains = spqr._leave_one_out(weight, spec, costs)
    for n in range(5):
        for k in range(16):
            group = range(k // 8 * 8, k // 8 * 8 + 8)
            rest = [j for j in group if j != k]
            whole = error(weight[n, list(group)], costs[list(group)])
            left = error(weight[n, rest], costs[rest])
            extreme = weight[n, k] in (weight[n, list(group)].min(), weight[n, list(group)].max())
            # An extreme weight may also be stored where that helps the others least: its own error is 0 then.
            assert gains[n, k] >= whole - left - 1e-6
            if not extreme:
                assert gains[n, k] == pytest.approx(whole - left, abs=1e-6)


@pytest.mark.parametrize("desc_act", [False, True])
def test_poor_data_is_no_worse_than_rounding(
    desc_act: bool, inputs: Tensor, random_weight: MakeWeight
) -> None:
    """Dead columns, one token, the same token again and again, nothing at all."""
    weight, spec = random_weight(16, COLUMNS), SpqrSpec()
    dead = inputs.clone()
    dead[:, 50:100] = 0
    nearest = ALGORITHMS.get("rtn").quantize(weight, spec, {"scale_search": False}).dequantize()
    for poor in (dead, inputs[:1], inputs[:1].expand(20, -1), torch.zeros(3, COLUMNS)):
        known = statistics_of(poor)
        result = quantize(weight, spec, known, desc_act=desc_act).dequantize()
        assert bool(result.isfinite().all())
        assert known.error(result - weight) <= 1.001 * known.error(nearest - weight) + 1e-12
        assert (result - weight).square().sum() < 30 * (nearest - weight).square().sum()


def test_it_needs_statistics_and_finite_weights(inputs: Tensor, random_weight: MakeWeight) -> None:
    weight = random_weight(4, COLUMNS)
    with pytest.raises(CalibrationError, match="give calibration data"):
        quantize(weight, SpqrSpec(), None)
    weight[1, 1] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        quantize(weight, SpqrSpec(), statistics_of(inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"desc_act": 1}, "desc_act must be True or False"),
        ({"refine": -1}, "refine must be an integer of at least 0, got -1"),
        ({"refine": True}, "refine must be an integer of at least 0, got True"),
        ({"damp_percent": 2}, "damp_percent must be a number from 0 to 1, got 2"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    method = ALGORITHMS.get("spqr")
    with pytest.raises(ConfigError, match=message):
        method.check(SpqrSpec(), {**method.options, **options})


def test_methods_and_formats_that_do_not_go_together() -> None:
    for method, spec in (("spqr", IntSpec()), ("gptq", SpqrSpec())):
        algorithm = ALGORITHMS.get(method)
        with pytest.raises(ConfigError, match="format"):
            algorithm.check(spec, algorithm.options)
