"""Batches follow the free memory; a run that goes on keeps those that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hfq
from hfq import HfqConfig
from hfq.calibration.sequences import MOST_TOKENS
from hfq.integrations import batching, resume
from hfq.integrations.batching import batch_tokens

from .tiny_models import build

pytestmark = pytest.mark.usefixtures("gate_in_this_process")

CPU = torch.device("cpu")


def free(monkeypatch: pytest.MonkeyPatch, count: float | None) -> None:
    monkeypatch.setattr(batching, "available_memory", lambda device: count)


@pytest.mark.parametrize(
    ("kind", "logits", "widest"),
    [
        ("llama", False, 96),
        ("llama", True, 128),  # vocabulary
        ("gpt2", False, 256),
        ("mixtral", False, 2 * 2 * 96),  # two experts, gate and up
    ],
)
def test_the_largest_activations_fit(
    kind: str, logits: bool, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    for count in (1e3, 1e6, 3e6, 1e7):
        free(monkeypatch, count)
        tokens = batch_tokens(model, CPU, logits=logits)
        assert tokens & (tokens - 1) == 0
        used = tokens * widest * 4 * batching._COPIES
        assert tokens == 1 or used <= batching._SHARE * count < 2 * used
        assert batch_tokens(model, CPU, logits=logits, processes=4) == max(1, tokens // 4)
    for plenty in (1e15, None):
        free(monkeypatch, plenty)
        assert batch_tokens(model, CPU, logits=logits) == MOST_TOKENS


def quantize(folder: Path, name: str, tokens: Tensor) -> hfq.Report:
    config = HfqConfig("gptq", dataset=tokens, num_samples=24, group_size=32, gptaq=0.5)
    return hfq.quantize(folder / "float", folder / name / "out", config, dtype="float32")


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / name / "out" / "model.safetensors")


def test_smaller_batches_give_the_same_but_for_rounding(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    reports = {}
    for name, count in (("roomy", 1e12), ("tight", 2.0e6)):
        free(monkeypatch, count)
        reports[name] = quantize(tmp_path, name, tokens)
    assert [report.batch_tokens for report in reports.values()] == [MOST_TOKENS, 256]
    first, second = weights(tmp_path, "roomy"), weights(tmp_path, "tight")
    codes = [name for name, tensor in first.items() if tensor.dtype == torch.uint8]
    differing = sum(int((first[name] != second[name]).sum()) for name in codes)
    assert differing <= 0.01 * sum(first[name].numel() for name in codes)
    held = [report.held_out for report in reports.values()]
    assert held[0] is not None and held[1] is not None
    assert held[0].perplexity == pytest.approx(held[1].perplexity, rel=0.01)
    assert held[0].kl == pytest.approx(held[1].kl, rel=0.05) and held[0].tokens == held[1].tokens


def test_a_run_that_goes_on_keeps_its_batches(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: resume.Resume, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        finish(self, index, *args)

    build("llama").save_pretrained(tmp_path / "float")
    finish = resume.Resume.finish
    free(monkeypatch, 2.0e6)
    quantize(tmp_path, "whole", tokens)
    with monkeypatch.context() as patch:
        patch.setattr(resume.Resume, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path, "cut", tokens)
    free(monkeypatch, 1e12)
    report = quantize(tmp_path, "cut", tokens)
    assert report.resumed_blocks == 1 and report.batch_tokens == 256
    first, second = weights(tmp_path, "whole"), weights(tmp_path, "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
