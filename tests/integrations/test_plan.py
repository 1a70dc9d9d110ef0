"""`hfq.plan` beside the run that it predicts: sizes to the byte, kernels, what is in the way; time and memory roughly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import hfq
from hfq import CheckpointError, ConfigError, HfqConfig
from hfq.integrations import obstacles, resume, streaming
from hfq.integrations.checkpoint import file_bytes

from .tiny_models import CONFIGS, QUICK, build, load

pytestmark = pytest.mark.usefixtures("gate_in_this_process", "brief_rates")


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(128, (20, 32), generator=generator)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def gptq(tokens: Tensor, **settings: Any) -> HfqConfig:
    merged = {"method": "gptq", "dataset": tokens, "num_samples": 8, "group_size": 32, **settings}
    if merged["method"] == "gptq":
        merged = {**QUICK, **merged}
    return HfqConfig(**merged)


def test_sizes_of_files_are_exact(tmp_path: Path, generator: torch.Generator) -> None:
    dtypes = (torch.float32, torch.uint8, torch.bfloat16, torch.int16, torch.float16)
    for count in (1, 2, 9, 10, 33):
        tensors = {
            f"größe.{'x' * n}.{n}": torch.zeros(n, count * 1000, dtype=dtypes[n % 5])
            for n in range(count)
        }
        save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
        expected = (tmp_path / "file").stat().st_size
        assert file_bytes({name: t.to("meta") for name, t in tensors.items()}) == expected


W8A8 = {"format": "int8", "activation": "dynamic", "group_size": None}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in CONFIGS),
    ("llama", {"quantize_lm_head": True, "sym": False, "bits": 3, "overrides": {"v_proj": None}}),
    ("llama_tied", {"quantize_embeddings": True}),
    ("llama", {"method": "rtn", **W8A8, "dataset": None}),
    ("llama", {"method": "smoothquant+gptq", **W8A8, "activation": "static"}),
    ("mixtral", {"method": "rtn", **W8A8, "activation": "static"}),
    ("llama", {"method": "rtn", **W8A8, "format": "fp8", "dataset": None}),
]


def cases_and_shards() -> Iterator[Any]:
    """Each case in one file or in several by turns; the other way is slow."""
    for number, (kind, changed) in enumerate(CASES):
        for sharded in (False, True):
            rest = (number + sharded) % 2
            name = f"{kind}-{changed}-{sharded}".replace(" ", "")
            yield pytest.param(kind, changed, sharded, id=name, marks=[pytest.mark.slow] * rest)


@pytest.mark.parametrize(("kind", "changed", "sharded"), list(cases_and_shards()))
def test_weights_and_bytes_are_those_of_the_run(
    kind: str,
    changed: dict[str, Any],
    sharded: bool,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sharded:
        monkeypatch.setattr(streaming, "_SINGLE_FILE_BYTES", 0)
    build(kind).save_pretrained(tmp_path / "float")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan = hfq.plan(tmp_path / "float", gptq(tokens, **changed), output=tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    hfq.quantize(tmp_path / "float", tmp_path / "out", gptq(tokens, **changed))
    written = (tmp_path / "out").glob("*.safetensors")
    assert plan.bytes_after == sum(path.stat().st_size for path in written)
    model = load(tmp_path / "out")
    expected = {
        (row.name, row.format, row.bits, row.group_size, row.shape, row.kernel, row.refused)
        for row in hfq.explain(model).weights
    }
    assert expected == {
        (row.name, row.format, *row.bits, row.group_size, row.shape, *row.kernels, row.refused)
        for row in plan.weights
    }
    assert plan.kept == model.hf_quantizer.selection.kept | {
        name: why for name, why in plan.kept.items() if why == "overrides"
    }
    assert plan.tokens == (0 if changed.get("dataset", tokens) is None else 8 * 32)
    assert json.loads(json.dumps(plan.to_dict()))["bytes_after"] == plan.bytes_after


def test_a_target_is_the_size(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    config = gptq(
        tokens, target_bits=4.1, candidate_bits=[2, 5, 8], overrides={"o_proj": {"bits": 8}}
    )
    plan = hfq.plan(source, config)
    hfq.quantize(source, tmp_path / "out", config)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.99 * plan.bytes_after <= size <= plan.bytes_after
    assert {row.bits for row in plan.weights} == {(2, 5, 8), (8,)}
    assert "cpu_rows16 (2, 8 bits), dequantize (5 bits)" in " ".join(plan.table().split())


OWN = {"dataset": None, "seqlen": 32}


@pytest.mark.parametrize(
    "settings",
    [{}, {"gptaq": 0.5}, {"target_bits": 4.1}, OWN, {**OWN, "target_bits": 4.1}],
    ids=str,
)
def test_the_disk_that_a_run_needs(
    settings: dict[str, Any],
    source: Path,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured whenever a file has been written."""
    most, rename = 0, resume._flush_and_rename

    def watch(*paths: Path) -> None:
        nonlocal most
        rename(*paths)
        # Small files around the weights (settings, the card) are not counted by a plan.
        files = (p for p in (tmp_path / "out").rglob("*") if ".safetensors" in p.name)
        most = max(most, sum(path.stat().st_size for path in files))

    monkeypatch.setattr(resume, "_flush_and_rename", watch)
    plan = hfq.plan(source, gptq(tokens, **settings))
    hfq.quantize(source, tmp_path / "out", gptq(tokens, **settings))
    assert 0.5 * plan.temporary_bytes < most < 1.02 * plan.temporary_bytes


# ---- time and memory

# `VmHWM`, not `ru_maxrss`: that one begins with what the parent had when it started the process.
_MEASURED = """
import json, sys, time, types, torch
torch.set_num_threads(1)
import hfq
from hfq.integrations import gate
gate._from_new_process = lambda *args: (gate.logits_of(*args), None)
from hfq.diagnose import rates
rates.time = types.SimpleNamespace(perf_counter=time.process_time)
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
tokens = torch.load(sys.argv[3], weights_only=True)
config = hfq.HfqConfig("gptq", dataset=tokens, num_samples=8)
times = []
for turn in range(3):
    plan = hfq.plan(sys.argv[1], config)
    start = time.process_time()
    hfq.quantize(sys.argv[1], sys.argv[2], config)
    seconds = time.process_time() - start
    predicted = plan.forecast.total_seconds - plan.forecast.seconds["check in a new process"]
    times.append(predicted / seconds)
    if turn == 0:
        memory = plan.forecast.peak_memory / peak()
    if 0.5 < times[-1] < 2:
        break
print(json.dumps({"time": times, "memory": memory}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' memory statistics")
def test_time_and_memory_are_about_right(tmp_path: Path, generator: torch.Generator) -> None:
    """Within a factor of 2. Seconds of the processor, on one thread: machines are busy. In smaller models the files take most."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "float"
    )
    torch.save(torch.randint(2000, (12, 128), generator=generator), tmp_path / "tokens")
    words = [str(tmp_path / name) for name in ("float", "out", "tokens")]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < found["memory"] < 2, found
    assert any(0.5 < ratio < 2 for ratio in found["time"]), found


# ---- what is in the way


def test_problems_are_pointed_out(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = hfq.plan(source, gptq(tokens), output=tmp_path / "some" / "where")
    assert good.problems == ()
    used = namedtuple("used", "total used free")
    monkeypatch.setattr(
        obstacles.shutil, "disk_usage", lambda place: used(10**6, 10**6 - 1000, 1000)
    )
    monkeypatch.setattr(obstacles, "memory", lambda: (10**7, 10**6))
    monkeypatch.setattr(obstacles.os, "access", lambda place, mode: False)
    config = HfqConfig("gptq", group_size=60)
    problems = hfq.plan(source, config, output=tmp_path / "out").problems
    expected = (
        "no dataset is given (dataset=..., --dataset): the model samples its own calibration text",
        "group_size 60 does not divide the 64 columns of 12 weights such as "
        "model.layers.*.self_attn.q_proj: rows get a last group of 4",
        "group_size 60 does not divide the 96 columns of 2 weights",
        "memory: ",
        "cannot be written to",
        "disk: ",
    )
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert start in problem
    (tmp_path / "file").touch()
    assert "is a file" in hfq.plan(source, HfqConfig(), output=tmp_path / "file" / "x").problems[-1]
    no_rest = gptq(tokens[:8], seqlen=32)
    assert "nothing is left to compare" in hfq.plan(source, no_rest).problems[0]


def test_checkpoints_that_cannot_be_planned_with(
    source: Path, tokens: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is no folder here: a plan reads local files only"):
        hfq.plan("somebody/some-model", HfqConfig())
    with pytest.raises(ConfigError, match="expected token ids below 128"):
        hfq.plan(source, gptq(tokens + 100))
    file = source / "model.safetensors"
    whole = load_file(file)
    for damage, message in (
        (
            whole["model.layers.1.mlp.up_proj.weight"].to(torch.float8_e4m3fn),
            "expected a float checkpoint",
        ),
        (torch.zeros(64, 96), r"has shape \(64, 96\), the model in config.json expects \(96, 64\)"),
        (None, "has no tensor for 1 parameters"),
    ):
        tensors = dict(whole)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        if damage is not None:
            tensors["model.layers.1.mlp.up_proj.weight"] = damage
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            hfq.plan(source, gptq(tokens))
