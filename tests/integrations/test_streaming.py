"""`hfq.quantize`: the files of ``from_pretrained``, block by block; what is refused; memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hfq import CheckpointError, ConfigError, HfqConfig
from hfq.integrations import streaming
from hfq.integrations.card import CARD
from hfq.integrations.report import PICTURE, REPORT

from .quantize_runs import HELD_OUT, digests, gptq, run
from .tiny_models import CONFIGS, build, load, stored_names

pytestmark = pytest.mark.usefixtures("gate_in_this_process")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(HELD_OUT).logits


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
