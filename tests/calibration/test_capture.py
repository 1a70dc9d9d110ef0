"""Second moments of what modules read."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfq.calibration.capture import Capture, EverythingRead, RowSample, recording
from hfq.calibration.ranks import Ranks
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


# ---- samples of what modules read


def test_a_sample_is_drawn_evenly_from_all_batches() -> None:
    """Each of 40 batches of 100 tokens gives about a fortieth."""
    sample = RowSample(400)
    for batch in range(40):
        sample.add(torch.full((100, 3), float(batch + 1)))
    rows = sample.rows()
    assert rows is not None and rows.shape == (401, 3)
    counts = torch.bincount(rows[:-1, 0].long(), minlength=41)[1:]
    assert counts.sum() == 400 and counts.min() >= 1 and counts.max() <= 25
    assert torch.equal(rows[-1], torch.full((3,), 40.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_keeps_few_tokens_whole_and_in_order(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, sample = torch.randn(30, 5, generator=generator).to(dtype), RowSample()
    for part in (x[:7], x[:0], x[7:]):
        sample.add(part)
    rows, largest = sample.rows(), sample.largest()
    assert rows is not None and largest is not None
    assert rows.dtype == dtype and torch.equal(rows[:-1], x)
    assert torch.equal(largest, x.float().abs().amax(0)) and largest.dtype == torch.float32
    assert rows[-1].abs().max() == x.abs().max()
    assert RowSample().rows() is None and RowSample().largest() is None


def test_the_extreme_token_is_never_lost(generator: torch.Generator) -> None:
    sample = RowSample(4)
    for batch in range(20):
        x = torch.randn(50, 6, generator=generator)
        if batch == 3:
            x[17, 2] = -900.0
        sample.add(x)
    rows = sample.rows()
    assert rows is not None and rows.shape == (5, 6) and rows[-1, 2] == -900


def test_what_is_no_number_stays_in_the_sample(generator: torch.Generator) -> None:
    sample = RowSample(4)
    for batch in range(9):
        x = torch.randn(50, 6, generator=generator)
        if batch == 2:
            x[5, 1] = float("nan")
        sample.add(x)
    rows, largest = sample.rows(), sample.largest()
    assert rows is not None and largest is not None
    assert rows[-1, 1].isnan() and largest[1].isnan() and largest[0].isfinite()


def test_samples_are_kept_on_request_only(generator: torch.Generator) -> None:
    model, x = Attention(), torch.randn(4, 9, 12, generator=generator)
    found = {}
    for sampled in (False, True):
        with torch.no_grad(), Capture(modules(model), sampled) as capture:
            model(x)
        found[sampled] = capture.statistics()["q"]
    assert found[False] is not None and found[True] is not None
    assert found[False].sample is None and found[False].largest is None
    assert found[True].sample is not None and found[True].sample.shape == (37, 12)
    factors = torch.rand(12, generator=generator) + 0.5
    scaled = found[True].rescaled(factors)
    assert scaled.sample is not None and scaled.largest is not None
    torch.testing.assert_close(scaled.sample, found[True].sample / factors)
    torch.testing.assert_close(scaled.largest, x.flatten(0, 1).abs().amax(0) / factors)


class Pair(Ranks):
    """Two processes, of which the other one's values are known."""

    def __init__(self, others: list[Any]) -> None:
        super().__init__(0, 2)
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others.pop(0)]


@pytest.mark.parametrize("cut", [0, 1, 300, 1000])
def test_samples_of_two_processes_are_that_of_one(cut: int, generator: torch.Generator) -> None:
    x, draws = (
        torch.randn(1000, 7, generator=generator),
        torch.rand(1000, generator=generator),
    )
    alone, first, second = RowSample(64), RowSample(64), RowSample(64)
    for start in range(0, 1000, 50):
        alone.add(x[start : start + 50], draws[start : start + 50])
    first.add(x[:cut], draws[:cut])
    second.add(x[cut:], draws[cut:])
    first.sum_over(Pair([second._kept]), x.device)
    for ours, theirs in ((first.rows(), alone.rows()), (first.largest(), alone.largest())):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


class Counted(nn.Module):
    """Two layers, the second one `times` times; counts the passes that came to its end."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.times, self.ended = times, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.second(x)
        self.ended += 1
        return x


@pytest.mark.parametrize("times, ended", [(1, 1), (2, 3), (0, 3)])
def test_passes_end_when_everything_is_read(
    times: int, ended: int, generator: torch.Generator
) -> None:
    """The first one never; none where a module reads twice, or not at all."""
    model = Counted(times)
    inputs = [torch.randn(2, 5, 12, generator=generator) for _ in range(3)]
    found = []
    for cuts in (False, True):
        model.ended = 0
        with torch.no_grad(), Capture(modules(model), cuts=cuts) as capture:
            for x in inputs:
                capture.next_batch()
                with suppress(EverythingRead):
                    model(x)
        found.append(capture.statistics())
    assert model.ended == ended
    for plain, cut in zip(*(each.values() for each in found), strict=True):
        assert (plain is None) == (cut is None)
        if plain is not None and cut is not None:
            assert plain.tokens == cut.tokens and torch.equal(plain.hessian, cut.hessian)
