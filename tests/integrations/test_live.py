"""Rows that appear on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from hfq import HfqConfig
from hfq.calibration.report import WeightReport
from hfq.integrations import live
from hfq.integrations.live import live_table

from .tiny_models import build, load


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(name: str, error: float | None = 0.012) -> WeightReport:
    return WeightReport(
        name=name, method="gptq", tokens=4096, error=error, damping=0.01, seconds=1.5
    )


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in a test's body: pytest sets its own stderr after the fixtures."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_rows_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(live.time, "perf_counter", lambda: next(clock))
    long = f"model.layers.0.{'deep.' * 9}down_proj"
    with live_table(["a", long]) as show:
        assert show is not None
        assert terminal.getvalue().splitlines()[0].split() == list(live._HEADER)
        show(report("a"), 1.0, 3.0)  # 10 s for a quarter
        assert len(terminal.getvalue().splitlines()) == 3
        show(report(long, None), 4.0, 0.0)
    header, rule, first, second = terminal.getvalue().splitlines()
    assert first.split() == ["a", "1.20e-02", "4096", "0.01", "1.5", "s", "30.0", "s"]
    assert second.startswith("…") and "down_proj " in second and second.endswith(" 0.0 s")
    assert len(header) == len(rule) == len(first) == len(second) <= 105


def test_nothing_is_written_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with live_table(["a"]) as show:
        assert show is None
    terminal = on_terminal(monkeypatch)
    with live_table(["a"], enabled=False) as show:
        assert show is None
    with live_table([]) as show:
        assert show is None
    assert terminal.getvalue() == "" and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_every_weight_has_its_row_and_the_costs_add_up(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    build(kind).save_pretrained(tmp_path)
    config = HfqConfig("gptq", group_size=32, dataset=torch.arange(64).view(2, 32))
    model = load(tmp_path, quantization_config=config, dtype=torch.float32)
    names = [weight.name for weight in model.hf_quantizer.calibration.weights]
    lines = terminal.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == list(live._HEADER))
    rows = [line for line in lines[start + 2 :] if line.startswith(("model.", "transformer."))]
    assert [row.split()[0] for row in rows] == names
    assert rows[-1].endswith(" 0.0 s") and not rows[0].endswith(" 0.0 s")
