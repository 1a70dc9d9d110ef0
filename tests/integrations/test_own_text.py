"""`hfq.quantize` without a dataset: the model samples its own text, in memory or block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hfq
from hfq import HfqConfig
from hfq.calibration.sample import sample_sequences
from hfq.integrations import own_text, resume, streaming
from hfq.integrations.source import FloatCheckpoint

from .tiny_models import CONFIGS, build, load

pytestmark = pytest.mark.usefixtures("gate_in_this_process")


def config(**settings: Any) -> HfqConfig:
    merged = {"group_size": 32, "num_samples": 5, "seqlen": 16, **settings}
    return HfqConfig("gptq", kernel_mode="exact", **merged)


def test_it_gives_what_from_pretrained_gives(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float", max_shard_size="50KB")
    report = hfq.quantize(tmp_path / "float", tmp_path / "out", config(), dtype="float32")
    expected = load(
        tmp_path / "float", quantization_config=config(dataset="self"), dtype=torch.float32
    )
    assert report.calibration is not None and report.held_out is None
    assert report.calibration.sha256 == expected.hf_quantizer.calibration.sha256
    expected.save_pretrained(tmp_path / "saved")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_streamed_model_samples_the_same_text(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    source = FloatCheckpoint(tmp_path, config(), "float32", torch.device("cpu"))
    monkeypatch.setattr(own_text, "available_memory", lambda device: source.float_bytes)
    said: list[str] = []
    monkeypatch.setattr(own_text.logger, "warning", said.append)
    found = own_text.own_sequences(source, config(), tmp_path / "kept")
    first = model.config.get_text_config().bos_token_id
    expected = sample_sequences(model, 5, 16, 0, first, 128)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (message,) = said
    assert "does not fit into the free memory" in message and "read 15 times from disk" in message


def test_one_block_of_a_streamed_model_is_in_memory(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    source = FloatCheckpoint(tmp_path, config(), "float32", torch.device("cpu"))
    seen: list[list[bool]] = []
    model = source.float_model()
    layers = model.model.layers

    def look(*_: Any) -> None:
        seen.append([all(not p.is_meta for p in layer.parameters()) for layer in layers])

    for layer in layers:
        layer.mlp.register_forward_pre_hook(look)
    with torch.no_grad():
        model(torch.arange(9)[None])
    assert all(p.is_meta for layer in layers for p in layer.parameters())
    assert seen == [[True, False], [False, True]]


def test_long_text_is_cut_where_each_token_costs_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path)
    source = FloatCheckpoint(tmp_path, config(), "float32", torch.device("cpu"))
    monkeypatch.setattr(own_text, "available_memory", lambda device: 0)
    monkeypatch.setattr(own_text, "_SHORT", 6)
    found = own_text.own_sequences(source, config(), tmp_path / "kept")
    assert [len(tokens) for tokens in found] == [6] * 5


def test_a_run_that_goes_on_samples_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path / "float")

    def stop(self: resume.Resume, index: int, *args: Any) -> None:
        if index == stop_at:
            raise KeyboardInterrupt
        finish(self, index, *args)

    finish, sampled = resume.Resume.finish, own_text._sampled
    count: list[int] = []
    monkeypatch.setattr(own_text, "_sampled", lambda *args: count.append(1) or sampled(*args))
    for stop_at in (0, 1, 9):  # noqa: B007  (read by stop)
        with monkeypatch.context() as patch:
            patch.setattr(resume.Resume, "finish", stop)
            try:
                report = hfq.quantize(tmp_path / "float", tmp_path / "out", config())
            except KeyboardInterrupt:
                continue
    assert len(count) == 1 and report.resumed_blocks == 1
    hfq.quantize(tmp_path / "float", tmp_path / "other", config(seed=1))
    assert len(count) == 2
    assert streaming.FOLDER not in {path.name for path in (tmp_path / "out").iterdir()}
