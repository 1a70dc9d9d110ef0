"""The check at the end of `hfq.quantize`: what was written is loaded again and must answer as the model did."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hfq
from hfq import CalibrationError, CheckpointError, HfqConfig
from hfq.calibration import run as run_module
from hfq.integrations import gate, streaming

from .quantize_runs import HELD_OUT, gptq, run
from .tiny_models import build, load

pytestmark = pytest.mark.usefixtures("gate_in_this_process")


def test_a_model_that_answers_otherwise_is_not_kept(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Any, prefix: str) -> dict[str, Tensor]:
        tensors = whole(self, prefix)
        return {
            name: tensor.flip(0) if name.endswith("layers.1.mlp.up_proj.weight") else tensor
            for name, tensor in tensors.items()
        }

    whole = streaming._Run._tensors
    monkeypatch.setattr(streaming._Run, "_tensors", damaged)
    with pytest.raises(CheckpointError, match="does not reproduce the quantized one"):
        run(source, tmp_path / "out", gptq(tokens))
    assert not (tmp_path / "out").exists()


@pytest.mark.real_gate
def test_a_model_that_cannot_be_loaded_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming._Run, "_write_settings", lambda self, folder: None)
    with pytest.raises(CheckpointError, match="cannot be loaded again"):
        run(source, tmp_path / "out", HfqConfig(group_size=32))
    assert not (tmp_path / "out").exists()


@pytest.mark.real_gate
def test_a_speed_that_cannot_be_measured_costs_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process fails after the logits: the folder for the speed is missing."""
    said: list[str] = []
    monkeypatch.setattr(gate.logger, "warning", said.append)
    run_process = subprocess.run

    def without_place(words: list[str], **settings: Any) -> Any:
        return run_process([*words[:6], "/nowhere/speed", *words[7:]], **settings)

    monkeypatch.setattr(gate.subprocess, "run", without_place)
    report = run(source, tmp_path / "out", HfqConfig(group_size=32))
    assert (
        report.logit_difference == 0 and report.speed is None and "tokens/s" not in report.table()
    )
    assert len(said) == 1 and "speed of the written model could not be measured" in said[0]


def test_nan_does_not_pass_the_gate(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    expected = torch.full((2, 17, 128), torch.nan)
    with pytest.raises(CheckpointError, match="differ by nan"):
        gate.check_reloaded(tmp_path, HELD_OUT, expected, torch.device("cpu"))


def test_models_that_do_not_run_in_blocks_are_loaded_only(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise CalibrationError("blocks in no order")

    monkeypatch.setattr(run_module, "record_calls", refuse)
    report = run(source, tmp_path / "out", HfqConfig(group_size=32))
    assert report.logit_difference is None and "finite logits" in report.table()
    load(tmp_path / "out")
    with pytest.raises(CalibrationError, match="blocks in no order"):
        run(source, tmp_path / "other", gptq(tokens))


def test_16_bits_without_data_pass_the_check(source: Path, tmp_path: Path) -> None:
    """Packed modules compute with exact activations in training mode, and with int8 ones when they are loaded."""
    report = hfq.quantize(source, tmp_path / "out", HfqConfig(group_size=32), dtype="bfloat16")
    assert report.logit_difference == 0


@pytest.mark.parametrize("mode", ["auto", "exact", "int8"])
@pytest.mark.parametrize("length", [8, 64])
def test_the_check_runs_the_kernels_of_the_run(
    mode: str, length: int, source: Path, generator: torch.Generator, tmp_path: Path
) -> None:
    """With few tokens in bfloat16 kernels may quantize activations: both sides do, or none."""
    config = gptq(torch.randint(128, (32, length), generator=generator), kernel_mode=mode)
    report = hfq.quantize(source, tmp_path / "out", config, dtype="bfloat16")
    assert report.logit_difference is not None and report.logit_difference <= 1e-3
