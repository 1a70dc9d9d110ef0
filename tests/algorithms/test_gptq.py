"""Method ``gptq``: the textbook's codes, smaller errors than rounding, and no crash on poor data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.algorithms import ALGORITHMS, find_method
from hfq.core import affine
from hfq.core.errors import CalibrationError, ConfigError, WeightError
from hfq.core.spec import CodebookSpec, Int8Spec, IntSpec, QuantSpec
from hfq.core.statistics import InputStatistics
from hfq.core.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]

SPECS: list[QuantSpec] = [
    *(IntSpec(bits=bits, group_size=32, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    IntSpec(bits=3, group_size=-1),
    IntSpec(
        bits=4, group_size=200, sym=False, scale_dtype="bfloat16"
    ),  # groups longer than a block
    CodebookSpec(group_size=64),
    Int8Spec(),
]
COLUMNS = 300  # two blocks and a bit, a short last group


def quantize(
    weight: Tensor, spec: QuantSpec, statistics: InputStatistics | None, **options: Any
) -> QuantizedWeight:
    gptq = ALGORITHMS.get("gptq")
    settings = {**gptq.options, **options}
    gptq.check(spec, settings)
    return gptq.quantize(weight, spec, settings, statistics)


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    """Correlated activations `[T, K]` of very different sizes."""
    mixed = torch.eye(COLUMNS) + 0.1 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    scale = torch.rand(COLUMNS, generator=generator).square() * 3
    return torch.randn(1000, COLUMNS, generator=generator) @ mixed * scale


def statistics_of(inputs: Tensor) -> InputStatistics:
    return InputStatistics(tokens=len(inputs), hessian=inputs.T @ inputs / len(inputs))


def textbook(weight: Tensor, hessian: Tensor, spec: QuantSpec, damp: float) -> Tensor:
    """Frantar et al., algorithm 1, as it is printed: inverse, Cholesky, one column at a time, float64; codes."""
    remaining, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    size = weight.shape[1] if spec.group_size == -1 else spec.group_size
    for k in range(weight.shape[1]):
        if k % size == 0:
            grid = affine.range_grid(remaining[:, k : k + size].float(), spec)
            stored = affine.store_grid(*grid, spec)
        column = remaining[:, k : k + 1].float()
        zeros = stored.float_zeros
        scales = stored.scales.float()
        codes[:, k] = affine.round_to_grid(column, scales, zeros, spec)[:, 0]
        rounded = (
            affine.grid_points(
                column.unsqueeze(1),
                scales,
                zeros,
                affine.codebook_of(spec, column.device),
                spec.bits,
            )[:, 0, 0]
            * scales[:, 0]
        )
        error = (remaining[:, k] - rounded) / upper[k, k]
        remaining[:, k + 1 :] -= error.outer(upper[k, k + 1 :])
    return codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_textbook_algorithm(
    spec: QuantSpec, inputs: Tensor, random_weight: MakeWeight
) -> None:
    weight, known = random_weight(40, COLUMNS), statistics_of(inputs)
    ours = quantize(weight, spec, known, scale_search=False, desc_act=False, refine=0).codes
    same = (ours == textbook(weight, known.hessian, spec, 0.01)).float().mean(1)
    # A tie that float32 rounds the other way changes the rest of its row.
    assert same.median() == 1.0 and same.mean() > 0.9


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("desc_act", [False, True])
def test_the_layer_is_closer_than_by_rounding(
    spec: QuantSpec, desc_act: bool, inputs: Tensor, heavy_tailed_weight: MakeWeight
) -> None:
    weight, known = heavy_tailed_weight(64, COLUMNS), statistics_of(inputs)
    nearest = ALGORITHMS.get("rtn").quantize(weight, spec, {"scale_search": True}, known)
    ours = quantize(weight, spec, known, desc_act=desc_act)
    held = (
        torch.randn(400, COLUMNS, generator=torch.Generator().manual_seed(1))
        @ torch.linalg.cholesky(known.hessian + 1e-6 * torch.eye(COLUMNS)).T
    )

    def error(quantized: QuantizedWeight) -> float:
        return (held @ (quantized.dequantize() - weight).T).square().sum().item()

    assert error(ours) < 0.85 * error(nearest)


def test_important_columns_first_is_better(inputs: Tensor, random_weight: MakeWeight) -> None:
    weight, known, spec = random_weight(64, COLUMNS), statistics_of(inputs), IntSpec(bits=3)
    errors = [
        known.error(quantize(weight, spec, known, desc_act=order, refine=0).dequantize() - weight)
        for order in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("group_size", [32, 200, -1])
@pytest.mark.parametrize("sym", [False, True])
def test_groups_follow_the_order_of_rounding(
    group_size: int, sym: bool, inputs: Tensor, random_weight: MakeWeight
) -> None:
    """It is the same as without act-order where columns are sorted beforehand."""
    spec = IntSpec(bits=3, group_size=group_size, sym=sym, static_groups=False)
    known, weight = statistics_of(inputs), random_weight(20, COLUMNS)
    order = known.factor(0.01, True).order
    for turns in (0, 2):
        found = quantize(weight, spec, known, refine=turns)
        usual = replace(spec, static_groups=True)
        in_order = statistics_of(inputs[:, order])
        expected = quantize(weight[:, order], usual, in_order, refine=turns, desc_act=False)
        same = (found.codes[:, order] == expected.codes).float().mean()
        assert same > 0.97  # products of other sizes round otherwise
        assert found.g_idx is not None and found.g_idx.dtype == torch.int32
        sizes = found.g_idx.bincount()
        assert sizes.tolist() == [len(part) for part in order.split(sizes.max().item())]
        ours = known.error(weight - found.dequantize())
        theirs = in_order.error(weight[:, order] - expected.dequantize())
        assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("desc_act", [False, True])
def test_a_second_look_lowers_the_error(
    spec: QuantSpec, desc_act: bool, inputs: Tensor, random_weight: MakeWeight
) -> None:
    weight, known = random_weight(40, COLUMNS), statistics_of(inputs)
    with known.damped(0.01) as hessian:
        damped = hessian.clone()
    errors = []
    for turns in (0, 1, 3):
        quantized = quantize(weight, spec, known, desc_act=desc_act, refine=turns)
        difference = quantized.dequantize() - weight
        errors.append((difference @ damped * difference).sum(1))
    assert bool((errors[1] <= errors[0] * 1.001).all() and (errors[2] <= errors[1] * 1.001).all())
    assert errors[1].sum() < errors[0].sum()


def test_double_quantized_scales_are_those_that_codes_were_chosen_for(
    inputs: Tensor, random_weight: MakeWeight
) -> None:
    weight, known = random_weight(64, COLUMNS), statistics_of(inputs)
    single = quantize(weight, CodebookSpec(), known, desc_act=True)
    double = quantize(weight, CodebookSpec(double_quant=True), known, desc_act=True)
    assert double.scale_codes is not None
    errors = [known.error(each.dequantize() - weight) for each in (single, double)]
    assert errors[1] < 1.1 * errors[0]


def test_drift_of_the_inputs_is_made_good(
    inputs: Tensor, random_weight: MakeWeight, generator: torch.Generator
) -> None:
    """The layers before are quantized: this one reads x, and should answer as the float one to x'."""
    weight, spec = random_weight(64, COLUMNS), IntSpec(bits=4, group_size=64)
    wanted, read = (
        inputs,
        inputs + 0.2 * inputs.roll(1, 1) + 0.05 * torch.randn(inputs.shape, generator=generator),
    )
    known = statistics_of(read)
    known.drift = (wanted - read).T @ read / len(read)

    def error(**options: Any) -> float:
        quantized = quantize(weight, spec, known, **options).dequantize()
        return (read @ quantized.T - wanted @ weight.T).square().sum().item()

    assert error(gptaq=1.0) < 0.3 * error()
    assert error(gptaq=1.0) < error(gptaq=0.5) < error()


def test_without_drift_nothing_changes(inputs: Tensor, random_weight: MakeWeight) -> None:
    weight, known, spec = random_weight(8, COLUMNS), statistics_of(inputs), IntSpec()
    plain = quantize(weight, spec, known)
    assert torch.equal(quantize(weight, spec, known, gptaq=1.0).codes, plain.codes)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_poor_data_is_no_worse_than_rounding(
    spec: QuantSpec, desc_act: bool, inputs: Tensor, random_weight: MakeWeight
) -> None:
    """Dead columns, one token, the same token again and again, nothing at all."""
    weight = random_weight(16, COLUMNS)
    dead = inputs.clone()
    dead[:, 50:200] = 0
    for poor in (dead, inputs[:1], inputs[:1].expand(20, -1), torch.zeros(3, COLUMNS)):
        known = statistics_of(poor)
        result = quantize(weight, spec, known, desc_act=desc_act).dequantize()
        nearest = ALGORITHMS.get("rtn").quantize(weight, spec, {"scale_search": False})
        rounded = nearest.dequantize()
        assert bool(result.isfinite().all())
        assert known.error(result - weight) <= 1.001 * known.error(rounded - weight) + 1e-12
        # Errors that cost nothing on this data must not get out of hand for other data.
        assert (result - weight).square().sum() < 30 * (rounded - weight).square().sum()


def test_it_needs_statistics_and_finite_weights(inputs: Tensor, random_weight: MakeWeight) -> None:
    weight = random_weight(4, COLUMNS)
    with pytest.raises(CalibrationError, match="give calibration data"):
        quantize(weight, IntSpec(), None)
    weight[1, 1] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        quantize(weight, IntSpec(), statistics_of(inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"desc_act": 1}, "desc_act must be True or False"),
        ({"scale_search": None}, "scale_search must be True or False"),
        ({"damp_percent": 2}, "damp_percent must be a number from 0 to 1, got 2"),
        ({"damp_percent": True}, "damp_percent must be"),
        ({"refine": -1}, "refine must be an integer of at least 0, got -1"),
        ({"gptaq": "yes"}, "gptaq must be a number from 0 to 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    gptq = ALGORITHMS.get("gptq")
    with pytest.raises(ConfigError, match=message):
        gptq.check(IntSpec(), {**gptq.options, **options})


def test_groups_without_an_order_are_refused() -> None:
    spec = IntSpec(static_groups=False)
    gptq = ALGORITHMS.get("gptq")
    with pytest.raises(ConfigError, match="set desc_act=True or leave static_groups out"):
        gptq.check(spec, {**gptq.options, "desc_act": False})
    with pytest.raises(ConfigError, match="method 'rtn' has no order"):
        find_method("rtn").check(spec, ALGORITHMS.get("rtn").options)
