"""Runs of `hfq.quantize` that were killed or failed go on where they were, and give the same files."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import hfq
from hfq import HfqConfig, ResumeError, SaveError
from hfq.integrations import resume

from .quantize_runs import digests, gptq, run

pytestmark = pytest.mark.usefixtures("gate_in_this_process")


@pytest.mark.parametrize("gptaq", [0.0, 0.5])
def test_only_what_is_compared_is_kept_twice(
    gptaq: float, source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[set[str]] = []
    finish = resume.Resume.finish

    def watch(self: resume.Resume, index: int, tensors: Any, streams: Any, *args: Any) -> None:
        kept.append(set(streams))
        finish(self, index, tensors, streams, *args)

    monkeypatch.setattr(resume.Resume, "finish", watch)
    run(source, tmp_path / "out", gptq(tokens, gptaq=gptaq))
    # One batch to calibrate with; the sequence that is checked again and a batch of others to compare the models on.
    both = {"hidden.0", "hidden.1", "wanted.1", "hidden.2", "wanted.2"}
    assert kept == [both | ({"wanted.0"} if gptaq else set())] * 2


_CHILD = """
import sys, torch, hfq
torch.set_num_threads(1)
tokens = torch.load(sys.argv[3], weights_only=True)
config = hfq.HfqConfig("gptq", dataset=tokens, num_samples=24, group_size=32, gptaq=0.5)
hfq.quantize(sys.argv[1], sys.argv[2], config, dtype="float32")
"""


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Eight blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def start(source: Path, output: Path, data: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", _CHILD, str(source), str(output), str(data)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_killed_run_goes_on_and_gives_the_same_files(
    deep: Path, tokens: Tensor, tmp_path: Path
) -> None:
    """SIGKILL at random moments after the block whose turn it is; ``HFQ_TEST_KILLS`` times (1)."""
    data = tmp_path / "tokens.pt"
    torch.save(tokens, data)

    def config() -> HfqConfig:
        return HfqConfig("gptq", dataset=tokens, num_samples=24, group_size=32, gptaq=0.5)

    run(deep, tmp_path / "whole" / "out", config())
    output = tmp_path / "cut" / "out"
    state = output / resume.FOLDER / "state.json"
    chance = random.Random(0)
    kills = int(os.environ.get("HFQ_TEST_KILLS", "1"))
    for kill in range(kills):
        wanted = 1 + 6 * (kill + 1) // (kills + 1)
        child = start(deep, output, data)
        while not (state.exists() and json.loads(state.read_text())["done"] >= wanted):
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert json.loads(state.read_text())["done"] >= wanted
        assert not (output / "config.json").exists()
    assert run(deep, output, config()).resumed_blocks >= 1
    assert digests(output) == digests(tmp_path / "whole" / "out")


@pytest.fixture
def unfinished(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An output folder in which one of two blocks is done."""

    def stop(self: resume.Resume, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        finish(self, index, *args)

    finish = resume.Resume.finish
    with monkeypatch.context() as patch:
        patch.setattr(resume.Resume, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", gptq(tokens))
    return tmp_path / "out"


@pytest.mark.parametrize("native", [False, True])
def test_a_run_out_of_memory_says_so_and_keeps_its_blocks(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    def full(self: resume.Resume, index: int, *args: Any) -> None:
        if index == 1 and native:
            raise RuntimeError("hfq: no memory for a tensor of 8 elements: CUDA out of memory. ...")
        if index == 1:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
        finish(self, index, *args)

    finish = resume.Resume.finish
    with monkeypatch.context() as patch:
        patch.setattr(resume.Resume, "finish", full)
        with pytest.raises(MemoryError, match=r"not enough memory: .* Blocks that are done stay"):
            run(source, tmp_path / "out", gptq(tokens))
    assert run(source, tmp_path / "out", gptq(tokens)).resumed_blocks == 1


@pytest.mark.parametrize("changed", ["settings", "calibration data", "model", "dtype"])
def test_another_run_does_not_go_on(
    unfinished: Path, source: Path, tokens: Tensor, changed: str
) -> None:
    config, settings = gptq(tokens), {"dtype": "float32"}
    if changed == "settings":
        config = gptq(tokens, bits=3)
    elif changed == "calibration data":
        config = gptq(tokens.flip(0))
    elif changed == "model":
        file = sorted(source.glob("*.safetensors"))[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        settings = {"dtype": "bfloat16"}
    with pytest.raises(ResumeError, match=rf"of which {changed} was another.*resume=False"):
        hfq.quantize(source, unfinished, config, **settings)
    report = hfq.quantize(source, unfinished, config, resume=False, **settings)
    assert report.resumed_blocks == 0 and not (unfinished / resume.FOLDER).exists()


def test_a_config_that_was_used_before_goes_on(
    unfinished: Path, source: Path, tokens: Tensor, tmp_path: Path
) -> None:
    config = gptq(tokens)
    before = config.to_dict()
    run(source, tmp_path / "other", config)
    assert config.to_dict() == before
    assert run(source, unfinished, config).resumed_blocks == 1


def test_a_damaged_state_is_no_state(unfinished: Path, source: Path, tokens: Tensor) -> None:
    (unfinished / resume.FOLDER / "state.json").write_text("{")
    assert run(source, unfinished, gptq(tokens)).resumed_blocks == 0


def test_a_full_disk_keeps_what_is_done(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, **settings: Any) -> None:
        if path.name.startswith("block-00001"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **settings)

    save_file = resume.save_file
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", full)
        with pytest.raises(
            SaveError, match=r"No space left.*1 finished blocks stay.*the same call"
        ):
            run(source, tmp_path / "out", gptq(tokens))
    assert not (tmp_path / "out" / "config.json").exists()
    assert run(source, tmp_path / "out", gptq(tokens)).resumed_blocks == 1
    assert not (tmp_path / "out" / resume.FOLDER).exists()
