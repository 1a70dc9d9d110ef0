"""`hfq.quantize`: the files of ``from_pretrained``, block by block; killed, resumed, refused, checked."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hfq
from hfq import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    HfqConfig,
    ResumeError,
    SaveError,
)
from hfq.calibration import run as run_module
from hfq.integrations import gate, resume, streaming
from hfq.integrations.card import CARD
from hfq.integrations.report import PICTURE, REPORT

from .tiny_models import CONFIGS, QUICK, build, load, stored_names

pytestmark = pytest.mark.usefixtures("gate_in_this_process")

HELD_OUT = torch.arange(34).view(2, 17)


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(128, (32, 32), generator=generator)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "float", max_shard_size="50KB")
    return tmp_path / "float"


def gptq(tokens: Tensor, **settings: Any) -> HfqConfig:
    merged = {"group_size": 32, "num_samples": 24, "kernel_mode": "exact", **QUICK, **settings}
    return HfqConfig("gptq", dataset=tokens, **merged)


def run(source: Path, output: Path, config: HfqConfig, **settings: Any) -> hfq.Report:
    return hfq.quantize(source, output, config, dtype="float32", **settings)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(HELD_OUT).logits


def digests(folder: Path) -> dict[str, str]:
    """Of all files that do not tell how long it took."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.name not in (REPORT, CARD)
    )
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# ---- the result


def architectures() -> Iterator[Any]:
    """Every pair of architecture, method and sharding; the other half of the triples is slow."""
    for number, kind in enumerate(CONFIGS):
        for method, sharded in itertools.product(["gptq", "rtn"], [True, False]):
            rest = (number + (method == "rtn") + sharded) % 2
            yield pytest.param(kind, method, sharded, marks=[pytest.mark.slow] * rest)


@pytest.mark.parametrize(("kind", "method", "sharded"), list(architectures()))
def test_it_writes_what_from_pretrained_gives(
    kind: str,
    method: str,
    sharded: bool,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sharded:
        monkeypatch.setattr(streaming, "_SINGLE_FILE_BYTES", 0)
    build(kind).save_pretrained(tmp_path / "float", max_shard_size="50KB")

    def config() -> HfqConfig:
        if method == "gptq":
            slowly = {"refine": 2, "scale_search": True} if kind in ("llama", "mixtral") else {}
            return gptq(tokens, quantize_embeddings=kind == "llama_tied", **slowly)
        return HfqConfig(group_size=32, kernel_mode="exact")

    report = run(tmp_path / "float", tmp_path / "out", config())
    expected = load(tmp_path / "float", quantization_config=config(), dtype=torch.float32)
    assert torch.equal(logits(load(tmp_path / "out")), logits(expected))
    expected.save_pretrained(tmp_path / "saved")
    assert stored_names(tmp_path / "out") == stored_names(tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        files = [tmp_path / folder / name for folder in ("out", "saved")]
        written = [json.loads(file.read_text()) for file in files]
        for each in written:
            each.pop("transformers_version")
        assert written[0] == written[1]
    assert report.logit_difference == 0
    assert (report.calibration is not None) == (method == "gptq") == (report.held_out is not None)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (3 if sharded else 1)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.real_gate
def test_the_report_is_written_and_drawn(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", gptq(tokens, bits=3))
    written = json.loads((tmp_path / "out" / REPORT).read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert report.held_out is not None and report.held_out.tokens == 8 * 31
    assert 0 < report.held_out.kl < 1 and 0 < report.held_out.top1_agreement <= 1
    table = report.table()
    assert report.speed is not None and report.speed.prompt_tokens == 32
    assert report.speed.decode_tokens_per_s is not None and report.speed.decode_tokens_per_s > 1
    card = (tmp_path / "out" / CARD).read_text()
    assert "On `calibration text that was held out`:" in card
    for name, value in report.results().items():
        assert f"| {name} | {value:.4g} |" in card
    assert {
        "size_mb",
        "perplexity",
        "kl",
        "top1_agreement",
        "layer_error",
    } <= report.results().keys()
    for text in (
        "quantized 14 of 16",
        "decode ",
        "identical logits",
        "768 tokens in 24 sequences",
        "KL",
    ):
        assert text in table
    picture = (tmp_path / "out" / PICTURE).read_text()
    assert picture.startswith("<svg") and "self_attn.q_proj" in picture and "nan" not in picture


def test_all_of_the_data_may_be_used(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", gptq(tokens, num_samples=99))
    assert report.held_out is None and report.calibration is not None
    assert report.calibration.sequences == 32


def test_another_seed_gives_other_files(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(source, tmp_path / name / "out", gptq(tokens, seed=seed))
    found = [digests(tmp_path / name / "out") for name in "abc"]
    assert found[0] == found[1]
    assert found[0]["model.safetensors"] != found[2]["model.safetensors"]


def test_16_bits_without_data_pass_the_check(source: Path, tmp_path: Path) -> None:
    """Packed modules compute with exact activations in training mode, and with int8 ones when they are loaded."""
    report = hfq.quantize(source, tmp_path / "out", HfqConfig(group_size=32), dtype="bfloat16")
    assert report.logit_difference == 0


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


# ---- killed and resumed

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


# ---- the gate


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


# ---- what is refused


def test_inputs_that_cannot_be_used(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the model itself"):
        run(source, source, HfqConfig())
    with pytest.raises(CheckpointError, match="is no folder and cannot be had from the Hub"):
        run(tmp_path / "nowhere", tmp_path / "out", HfqConfig())
    run(source, tmp_path / "packed", HfqConfig(group_size=32))
    with pytest.raises(CheckpointError, match=r"quantized already \(by hfq\)"):
        run(tmp_path / "packed", tmp_path / "out", HfqConfig())
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="lacks model-00001"):
        run(source, tmp_path / "out", HfqConfig())
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="reads safetensors only, because other formats can"):
        run(source, tmp_path / "out", HfqConfig())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_tensors(source: Path, tmp_path: Path) -> None:
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = sorted(set(content["weight_map"].values()))[-1]
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != last}
    index.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"has no tensor for .* parameters of LlamaForCausalLM"
    ):
        run(source, tmp_path / "out", HfqConfig())


# ---- memory

# `VmHWM`, not `ru_maxrss`: that one begins with what the parent had when it started the process.
_LIMITED = """
import sys, torch, hfq
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
torch.set_num_threads(1)
torch.randn(300, 300) @ torch.randn(300, 300)
import transformers.models.llama.modeling_llama, hfq.integrations.streaming, hfq.kernels.dispatch
# That process has memory of its own.
hfq.integrations.streaming.check_reloaded = lambda *args: (0.0, None)
before = peak()
tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
config = hfq.HfqConfig(overrides={"o_proj": {"method": "gptq"}}, dataset=tokens, num_samples=4)
hfq.quantize(sys.argv[1], sys.argv[2], config)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' memory statistics")
def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """Sixteen blocks of 13 MB in float32, 205 MB: nothing near that is ever in memory."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "float", max_shard_size="50MB")
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}
    words = [sys.executable, "-c", _LIMITED, str(tmp_path / "float"), str(tmp_path / "out")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    assert size > 200e6 and peak < 0.5 * size, f"peak {peak / 1e6:.0f} MB of {size / 1e6:.0f} MB"


@pytest.mark.parametrize("mode", ["auto", "exact", "int8"])
@pytest.mark.parametrize("length", [8, 64])
def test_the_check_runs_the_kernels_of_the_run(
    mode: str, length: int, source: Path, generator: torch.Generator, tmp_path: Path
) -> None:
    """With few tokens in bfloat16 kernels may quantize activations: both sides do, or none."""
    config = gptq(torch.randint(128, (32, length), generator=generator), kernel_mode=mode)
    report = hfq.quantize(source, tmp_path / "out", config, dtype="bfloat16")
    assert report.logit_difference is not None and report.logit_difference <= 1e-3
