"""`target_bits`: the budget, both routes to the same model, runs that are killed while they measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hfq
from hfq import ConfigError, HfqConfig, ResumeError
from hfq.calibration import sensitivity
from hfq.integrations import batching, resume
from hfq.nn.packed import PackedModule

from .tiny_models import CONFIGS, QUICK, build, load, stored_names

pytestmark = pytest.mark.usefixtures("gate_in_this_process")

HELD_OUT = torch.arange(34).view(2, 17)


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(128, (12, 32), generator=generator)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def settings(tokens: Tensor, **changed: Any) -> HfqConfig:
    merged: dict[str, Any] = {"method": "gptq", "target_bits": 4.1, "group_size": 32, **changed}
    if "gptq" in merged["method"]:
        merged = {**QUICK, **merged}
    return HfqConfig(dataset=tokens, num_samples=8, kernel_mode="exact", **merged)


def stored_bits(model: torch.nn.Module) -> dict[str, int]:
    return {
        name if base == "weight" else f"{name}.{base}": slot.spec.bits
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for base, slot in module.slots.items()
    }


def average_bits(model: torch.nn.Module) -> float:
    """From the packed tensors themselves."""
    size = weights = 0
    for module in model.modules():
        if isinstance(module, PackedModule):
            for base, slot in module.slots.items():
                size += sum(tensor.nbytes for tensor in module.neutral_tensors(base).values())
                weights += torch.Size(slot.float_shape).numel()
    return 8 * size / weights


CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in CONFIGS),
    ("llama", {"refine": 1, "scale_search": True}),
    ("llama", {"method": "rtn", "sym": False, "target_bits": 5, "candidate_bits": [3, 5]}),
    ("llama", {"method": "awq+gptq", "awq_steps": 2, "quantize_lm_head": True}),
    ("llama_tied", {"quantize_embeddings": True, "overrides": {"down_proj": {"method": "rtn"}}}),
]


@pytest.mark.parametrize(("kind", "changed"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_both_routes_give_the_same_model(
    kind: str, changed: dict[str, Any], tokens: Tensor, tmp_path: Path
) -> None:
    build(kind).save_pretrained(tmp_path / "float", max_shard_size="50KB")
    report = hfq.quantize(
        tmp_path / "float", tmp_path / "out", settings(tokens, **changed), dtype="float32"
    )
    config = settings(tokens, **changed)
    model = load(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    again = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(HELD_OUT).logits, model(HELD_OUT).logits)
    model.save_pretrained(tmp_path / "saved")
    assert stored_names(tmp_path / "out") == stored_names(tmp_path / "saved")

    allocation = model.hf_quantizer.allocation
    assert allocation == report.allocation is not None
    bits = stored_bits(again)
    assert bits == stored_bits(model) and allocation.by_name.items() <= bits.items()
    if changed.get("quantize_embeddings") is None:
        assert allocation.bits_per_weight == pytest.approx(average_bits(again))
    assert config.target_bits - 0.7 < allocation.bits_per_weight <= config.target_bits
    assert len(set(allocation.bits)) > 1

    # Readers need nothing new, and the caller's config is as it was.
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["calibration"]["target_bits"] == config.target_bits
    assert not {"target_bits", "candidate_bits"} & written.keys()
    assert config == settings(tokens, **changed)
    assert "bits per weight (target" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["allocation"]["groups"]


def test_what_reads_the_same_shares_bits_and_overrides_stay(source: Path, tokens: Tensor) -> None:
    overrides = {"o_proj": {"bits": 5}, r"1\.mlp\.up": {"group_size": 16}, r"0\.mlp\.down": None}
    config = settings(tokens, overrides=overrides)
    model = load(source, quantization_config=config, dtype=torch.float32)
    bits, allocation = stored_bits(model), model.hf_quantizer.allocation
    assert [len(group.names) for group in allocation.groups] == [3, 2, 3, 2, 1]
    for group, chosen in zip(allocation.groups, allocation.bits, strict=True):
        assert {bits[name] for name in group.names} == {chosen}
    assert [bits[f"model.layers.{n}.self_attn.o_proj"] for n in range(2)] == [5, 5]
    assert allocation.fixed_weights == 2 * 64 * 64
    assert model.get_submodule("model.layers.1.mlp.up_proj").slots["weight"].spec.group_size == 16
    assert average_bits(model) == pytest.approx(allocation.bits_per_weight) and (
        allocation.bits_per_weight <= 4.1
    )


def test_costly_weights_get_more_bits(tokens: Tensor, tmp_path: Path) -> None:
    """A block whose output hardly matters leaves its bits to the other."""
    model = build("llama")
    for name, parameter in model.named_parameters():
        if "layers.0" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= 1e-3
    model.save_pretrained(tmp_path / "float")
    config = settings(tokens, candidate_bits=[2, 8], target_bits=5.6)
    found = load(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    bits = stored_bits(found)
    assert {count for name, count in bits.items() if "layers.0" in name} == {2}
    assert {count for name, count in bits.items() if "layers.1" in name} == {8}


def test_budgets_that_cannot_be_kept(source: Path, tokens: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes? at least \d+: raise target_bits"):
        hfq.quantize(source, tmp_path / "out", settings(tokens, target_bits=2), dtype="float32")
    assert not (tmp_path / "out").exists()


def test_without_a_dataset_the_model_s_own_text_is_measured(source: Path, tmp_path: Path) -> None:
    own = HfqConfig("gptq", target_bits=4.1, group_size=32, num_samples=5, seqlen=16)
    report = hfq.quantize(source, tmp_path / "out", own, dtype="float32")
    model = load(source, quantization_config=own, dtype=torch.float32)
    assert report.allocation == model.hf_quantizer.allocation is not None
    assert stored_bits(load(tmp_path / "out")) == stored_bits(model)


def test_a_run_killed_while_it_measures_goes_on(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tokens)
    whole = hfq.quantize(source, tmp_path / "whole" / "out", config, dtype="float32")

    finish, calls = resume.Resume.finish, []

    def stop(self: resume.Resume, index: int, *args: Any) -> None:
        calls.append((self.folder.name, index))
        if len(calls) == 2:
            raise KeyboardInterrupt
        finish(self, index, *args)

    output = tmp_path / "cut" / "out"
    # In turn: at the second block that is measured, at the first that is quantized, at the second.
    for done in ([(resume.MEASURED, 0)], [(resume.MEASURED, 1)], []):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(resume.Resume, "finish", stop)
            with pytest.raises(KeyboardInterrupt):
                hfq.quantize(source, output, config, dtype="float32")
        assert calls[: len(done)] == done
    with pytest.raises(ResumeError, match="settings was another"):
        hfq.quantize(source, output, settings(tokens, target_bits=4.2), dtype="float32")
    report = hfq.quantize(source, output, config, dtype="float32")
    assert report.resumed_blocks == 1 and report.allocation == whole.allocation
    first, second = (
        (p / "model.safetensors").read_bytes() for p in (output, tmp_path / "whole" / "out")
    )
    assert first == second
    assert not list(output.glob(".*"))


def test_a_run_that_goes_on_keeps_the_batches_that_it_measured_with(
    source: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever of its two parts it was killed; memory is plenty when it goes on."""
    finish, seen = resume.Resume.finish, []

    def stop(self: resume.Resume, index: int, *args: Any) -> None:
        finish(self, index, *args)
        if (self.folder.name, index) == stop_at:
            raise KeyboardInterrupt

    backward = sensitivity._through

    def watch(block: Any, entered: Tensor, *args: Any) -> Tensor:
        seen.append(entered.shape[:2].numel())
        return backward(block, entered, *args)

    monkeypatch.setattr(sensitivity, "_through", watch)
    monkeypatch.setattr(batching, "available_memory", lambda device: 2.0e6)
    whole = hfq.quantize(source, tmp_path / "whole" / "out", settings(tokens), dtype="float32")
    assert whole.batch_tokens == 256 and set(seen) == {64}
    for stop_at in ((resume.MEASURED, 0), (resume.MEASURED, 1), (resume.FOLDER, 0)):
        output = tmp_path / f"{stop_at[0]}-{stop_at[1]}" / "out"
        with monkeypatch.context() as patch:
            patch.setattr(resume.Resume, "finish", stop)
            with pytest.raises(KeyboardInterrupt):
                hfq.quantize(source, output, settings(tokens), dtype="float32")
        with monkeypatch.context() as patch:
            patch.setattr(batching, "available_memory", lambda device: 1e12)
            report = hfq.quantize(source, output, settings(tokens), dtype="float32")
        assert report.batch_tokens == 256 and report.allocation == whole.allocation
        first, second = (
            (p / "model.safetensors").read_bytes() for p in (output, tmp_path / "whole" / "out")
        )
        assert first == second
