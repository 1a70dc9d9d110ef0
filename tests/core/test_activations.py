"""Rounding of activations: per token, with a static scale, and what is no number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfq.core.activations import (
    check_input_scale,
    fit_input_scale,
    quantize_tokens,
    rounded_tokens,
    widest_input_scale,
)
from hfq.core.errors import CalibrationError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_token_is_rounded_to_the_nearest_step(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = (torch.randn(20, 33, generator=generator) * 5).to(dtype)
    codes, scales = quantize_tokens(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert codes.shape == (20, 33) and scales.shape == (20, 1)
    assert torch.equal(codes.abs().amax(-1), torch.full((20,), 127, dtype=torch.int8))
    exact = x.double()
    assert ((codes.double() * scales.double() - exact).abs() <= scales * 0.50001).all()
    assert torch.equal(rounded_tokens(x), codes * scales)


def test_tokens_do_not_depend_on_each_other(generator: torch.Generator) -> None:
    x = torch.randn(9, 40, generator=generator)
    codes, scales = quantize_tokens(x)
    for index in range(9):
        alone = quantize_tokens(x[index : index + 1])
        assert torch.equal(alone[0][0], codes[index]) and alone[1][0] == scales[index]


def test_nothing_and_almost_nothing_is_zero() -> None:
    codes, scales = quantize_tokens(torch.tensor([[0.0, -0.0], [1e-36, -1e-40]]))
    assert not codes.any() and torch.equal(scales, torch.zeros(2, 1))
    assert quantize_tokens(torch.empty(0, 7))[0].shape == (0, 7)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_token_that_is_no_number_has_no_scale(value: float, scale: float | None) -> None:
    x = torch.ones(3, 8)
    x[1, 5] = value
    static = None if scale is None else torch.tensor([scale])
    codes, scales = quantize_tokens(x, static)
    assert scales.isnan().flatten().tolist() == [False, True, False]
    assert codes[0].eq(codes[2]).all() and codes[0].any()


def test_static_scales_saturate_on_both_sides() -> None:
    x = torch.tensor(
        [[0.0, 0.24, 0.26, 63.4, 63.6, 1e30], [-0.24, -0.26, -0.75, -63.4, -80, -1e30]]
    )
    codes, scales = quantize_tokens(x, torch.tensor([0.5]))
    assert codes.tolist() == [[0, 0, 1, 127, 127, 127], [0, -1, -2, -127, -127, -127]]
    assert scales.tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF, 1e-40])
def test_unusable_static_scales_give_no_numbers(scale: float) -> None:
    assert not check_input_scale(torch.tensor([0.5, scale]))
    assert quantize_tokens(torch.ones(2, 3), torch.tensor([scale]))[1].isnan().all()
    assert check_input_scale(torch.tensor([0.5, 2.0]))


# ---- the static scale


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(30, 64, generator=generator)


def error(x: Tensor, weight: Tensor, scale: Tensor) -> float:
    return float(((rounded_tokens(x, scale) - x) @ weight.T).square().sum())


def test_extremes_that_hardly_count_are_clipped(weight: Tensor, generator: torch.Generator) -> None:
    x = torch.randn(256, 64, generator=generator)
    x[17, 3], weight[:, 3] = 30.0, 0.01
    scale, widest = fit_input_scale(x, weight, weight), widest_input_scale(x)
    assert scale.shape == (1,) and scale.dtype == torch.float32
    assert 0.1 * widest < scale < 0.3 * widest
    assert error(x, weight, scale) < 0.1 * error(x, weight, widest)


def test_extremes_that_matter_are_not_clipped(weight: Tensor, generator: torch.Generator) -> None:
    x = torch.randn(256, 64, generator=generator)
    x[:, 3] = 60 * x[:, 3].sign()
    assert torch.equal(fit_input_scale(x, weight, weight), widest_input_scale(x))


def test_where_nothing_arrives_any_scale_will_do(weight: Tensor) -> None:
    assert fit_input_scale(torch.zeros(4, 64), weight, weight).tolist() == [1.0]


@pytest.mark.parametrize(
    "x", [torch.full((2, 64), NAN), torch.full((2, 64), INF), torch.empty(0, 64)]
)
def test_a_sample_of_no_numbers_is_refused(x: Tensor, weight: Tensor) -> None:
    with pytest.raises(CalibrationError, match="use activation='dynamic', or keep this module"):
        fit_input_scale(x, weight, weight)
