"""The second moment of activations and its factorisation, whatever calibration brought."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfq.core.errors import CalibrationError
from hfq.core.statistics import Factor, InputStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


def statistics(inputs: Tensor) -> InputStatistics:
    return InputStatistics(tokens=len(inputs), hessian=inputs.T @ inputs / len(inputs))


def correlated(tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    mixed = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    scale = torch.rand(columns, generator=generator) * 3
    return torch.randn(tokens, columns, generator=generator) @ mixed * scale


def product(factor: Factor) -> Tensor:
    """M diag(costs) M^T back in the order of the columns, without the damping's share known to the caller."""
    m = factor.feedback.double()
    permuted = m @ torch.diag(factor.costs.double()) @ m.T
    inverse = factor.order.argsort()
    return permuted[inverse][:, inverse]


@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 64])
def test_the_factors_multiply_to_the_damped_moment(
    columns: int, by_importance: bool, generator: torch.Generator
) -> None:
    known = statistics(correlated(200, columns, generator))
    factor = known.factor(0.01, by_importance)
    assert factor.damping == 0.01
    damped = known.hessian + 0.01 * known.hessian.diagonal().mean() * torch.eye(columns)
    torch.testing.assert_close(product(factor).float(), damped, rtol=1e-4, atol=1e-5)
    assert torch.equal(factor.feedback.tril(-1), torch.zeros(columns, columns))
    torch.testing.assert_close(factor.feedback.diagonal(), torch.ones(columns))
    if by_importance:
        assert bool((known.importance[factor.order].diff() <= 0).all())
    else:
        assert factor.order.tolist() == list(range(columns))


def test_the_error_of_a_layer_falls_apart_into_columns(generator: torch.Generator) -> None:
    """The equation of `Factor`, and `error` as the mean over real outputs."""
    inputs = correlated(300, 24, generator)
    known = statistics(inputs)
    factor = known.factor(0.0, True)
    e = torch.randn(7, 24, generator=generator).double()
    outputs = (inputs.double() @ e.T).square().sum(1).mean().item()
    assert known.error(e.float()) == pytest.approx(outputs, rel=1e-4)
    in_order = e[:, factor.order]
    columns = (in_order @ factor.feedback.double()).square() @ factor.costs.double()
    assert columns.sum().item() == pytest.approx(outputs, rel=1e-4)


def test_a_factorisation_is_made_once(generator: torch.Generator) -> None:
    known = statistics(correlated(50, 8, generator))
    assert known.factor(0.01, True) is known.factor(0.01, True)
    assert known.factor(0.01, True) is not known.factor(0.01, False)


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1.0, 1e6, 1e18])
def test_one_token_needs_damping_only(scale: float, generator: torch.Generator) -> None:
    """A moment of rank 1, at any size of the activations."""
    known = statistics(torch.randn(1, 32, generator=generator) * scale)
    factor = known.factor(0.01, False)
    assert factor.damping == 0.01
    assert bool(factor.feedback.isfinite().all()) and bool((factor.costs > 0).all())


def test_damping_grows_where_it_does_not_suffice() -> None:
    """Not a second moment at all: one eigenvalue is -0.5."""
    damaged = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    factor = InputStatistics(tokens=3, hessian=damaged).factor(0.01, False)
    assert factor.damping == 1.0
    with pytest.raises(CalibrationError, match="cannot be factorised"):
        InputStatistics(tokens=3, hessian=torch.tensor([[1.0, 9.0], [9.0, 1.0]])).factor(
            0.01, False
        )


def test_columns_without_activations_are_left_alone(generator: torch.Generator) -> None:
    inputs = correlated(100, 6, generator)
    inputs[:, 2] = 0
    factor = statistics(inputs).factor(0.01, False)
    expected = torch.zeros(6)
    expected[2] = 1
    torch.testing.assert_close(factor.feedback[2], expected)
    torch.testing.assert_close(factor.feedback[:, 2], expected)


def test_nothing_ever_arrives() -> None:
    factor = InputStatistics(tokens=4, hessian=torch.zeros(3, 3)).factor(0.01, True)
    assert torch.equal(factor.feedback, torch.eye(3))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_moment_that_is_not_finite_is_refused(value: str) -> None:
    hessian = torch.eye(3)
    hessian[1, 1] = float(value)
    with pytest.raises(CalibrationError, match="NaN, infinite or too large"):
        InputStatistics(tokens=4, hessian=hessian).factor(0.01, False)
