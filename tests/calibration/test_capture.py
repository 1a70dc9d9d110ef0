"""Second moments of what modules read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hfq.calibration.capture import Capture, SecondMoment, recording
from hfq.core.errors import CalibrationError


class Attention(nn.Module):
    """q and k read the same, o something else; `spare` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.spare = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        return self.o(self.q(x) * self.k(x))


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_children())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [3, 1024, 1500])
def test_moments_add_up(columns: int, symmetric: bool, generator: torch.Generator) -> None:
    moment = SecondMoment(columns, torch.device("cpu"), symmetric)
    x = [torch.randn(tokens, columns, generator=generator) for tokens in (1, 7)]
    y = x if symmetric else [torch.randn(each.shape, generator=generator) for each in x]
    for pair in zip(x, y, strict=True):
        moment.add(*pair)
    expected = torch.cat(x).double().T @ torch.cat(y).double() / 8
    torch.testing.assert_close(moment.mean(8).double(), expected, rtol=1e-4, atol=1e-5)


def test_modules_that_read_the_same_share(generator: torch.Generator) -> None:
    model = Attention()
    inputs = [torch.randn(2, 5, 12, generator=generator) for _ in range(3)]
    with torch.no_grad(), Capture(modules(model)) as capture:
        for x in inputs:
            capture.next_batch()
            model(x)
    found = capture.statistics()
    assert found["q"] is found["k"] and found["o"] is not found["q"] and found["spare"] is None
    assert found["q"] is not None and found["q"].tokens == 30 and found["q"].drift is None
    tokens = torch.cat(inputs).flatten(0, 1)
    torch.testing.assert_close(found["q"].hessian, tokens.T @ tokens / 30)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_drift_is_taken_against_another_run(generator: torch.Generator) -> None:
    model, x = Attention(), torch.randn(2, 5, 12, generator=generator)
    wanted = x + torch.randn(x.shape, generator=generator)
    with torch.no_grad(), Capture(modules(model)) as capture:
        capture.enabled = False
        with recording(modules(model)) as beside:
            model(wanted)
        capture.enabled = True
        capture.next_batch(beside)
        model(x)
    found = capture.statistics()["k"]
    assert found is not None and found.drift is not None and found.tokens == 10
    rows = x.flatten(0, 1)
    expected = (wanted - x).flatten(0, 1).T @ rows / 10
    torch.testing.assert_close(found.drift, expected)


def test_reading_together_once_and_apart_later_is_refused(generator: torch.Generator) -> None:
    model, x = Attention(), torch.randn(4, 12, generator=generator)
    with torch.no_grad(), Capture(modules(model)) as capture:
        model(x)
        capture.next_batch()
        model.q(x)
        with pytest.raises(CalibrationError, match="k: it read the same activations as q"):
            model.k(x + 1)
