"""Peak memory of quantizing while loading and of loading packed, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20

# Peak above what the interpreter and its libraries take, in bytes.
# `VmHWM`, not `ru_maxrss`: that one begins with what the parent had when it started the process.
MEASURE = """
import json, sys, torch, hfq, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
settings = {"quantization_config": hfq.HfqConfig()} if sys.argv[2] else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, **settings)
used = peak() - before
packed = sum(p.numel() * p.element_size() for p in model.parameters())
if sys.argv[2]:
    model.save_pretrained(sys.argv[2])
print(json.dumps({"used": used, "packed": packed}))
"""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture(scope="module")
def folder(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of 600 MB, of which 460 MB are quantized."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=16,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("memory") / "float"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()  # the line before took them apart, and a file with both tensors is no tied checkpoint
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(path)
    return path


def measure(source: Path, target: Path | None) -> tuple[int, int]:
    command = [sys.executable, "-c", MEASURE, str(source), str(target or "")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    return found["used"], found["packed"]


def weights_in(folder: Path) -> Iterator[str]:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            yield from opened.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are released on Linux only")
def test_peak_is_the_packed_model_and_about_one_tensor(
    tied: bool, folder: Path, tmp_path: Path
) -> None:
    used, packed = measure(folder, tmp_path / "packed")
    largest = 16384 * 2048 * 2
    assert packed < 0.5 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert len(list(weights_in(folder))) == 1 + 4 * 9 + 1 + (not tied)
    # 60 MiB: libraries that only a load touches.
    assert used < packed + largest + 60 * MIB, (used / MIB, packed / MIB)
    loaded, _ = measure(tmp_path / "packed", None)
    assert loaded < 1.5 * packed + 60 * MIB, (loaded / MIB, packed / MIB)
