"""Activations of 8 bits and SmoothQuant as users run them: quantize, save, load, train adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import hfq
from hfq import CalibrationError, CheckpointError, ConfigError, HfqConfig
from hfq.inspection import inspect_checkpoint
from hfq.nn.experts import QuantExperts
from hfq.nn.linear import QuantLinear

from .tiny_models import build, load

pytestmark = [
    pytest.mark.usefixtures("one_thread", "gate_in_this_process"),
    # PEFT still uses the names that Transformers 5.23 renames.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

HELD_OUT = torch.arange(34).view(2, 17)
# A channel of the hidden states, of the values and of the MLP, and how much larger it becomes.
OUTLIER, FACTOR = 5, 80.0


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(128, (24, 32), generator=generator)


@torch.no_grad()
def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with a channel that is much larger than the others, wherever a Llama can hide that."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.input_layernorm.weight[OUTLIER] *= FACTOR
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            reader.weight[:, OUTLIER] /= FACTOR
        layer.post_attention_layernorm.weight[OUTLIER] *= FACTOR
        for reader in (mlp.gate_proj, mlp.up_proj):
            reader.weight[:, OUTLIER] /= FACTOR
        mlp.up_proj.weight[OUTLIER] *= FACTOR
        mlp.down_proj.weight[:, OUTLIER] /= FACTOR
    return model


def quantize(folder: Path, dataset: Any, **settings: Any) -> PreTrainedModel:
    config = HfqConfig(dataset=dataset, **{"method": "smoothquant", **settings})
    return load(folder, quantization_config=config, dtype=torch.float32)


def logits(model: PreTrainedModel, ids: Tensor = HELD_OUT) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def error(model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor) -> float:
    expected = logits(reference, ids)
    return ((logits(model, ids) - expected).norm() / expected.norm()).item()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"method": "smoothquant+gptq", "smoothing": 0.5}),
    ("llama", {"activation": "static", "quantize_lm_head": True}),
    ("llama", {"overrides": {"q_proj": {"activation": "static"}, "v_proj": {"smoothing": 0.3}}}),
    ("llama_tied", {"activation": "static", "quantize_embeddings": True}),
    ("gpt2", {"activation": "static"}),
    ("mixtral", {"activation": "static"}),
    ("qwen3_moe", {}),
    ("gpt_oss", {"activation": "static", "smoothing": 0.5}),
    ("llama", {"method": "rtn", "format": "int8", "activation": "static"}),
    ("llama", {"method": "rtn", "format": "fp8", "activation": "static", "quantize_lm_head": True}),
    ("llama", {"format": "fp8", "activation": "dynamic"}),
    ("llama_tied", {"format": "fp8", "activation": "static", "quantize_embeddings": True}),
    ("mixtral", {"format": "fp8", "activation": "static"}),
]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_save_and_load_give_the_same_logits(
    kind: str, settings: dict[str, Any], tokens: Tensor, tmp_path: Path
) -> None:
    reference = build(kind)
    reference.save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", tokens, **settings)
    assert 0 < error(model, reference, HELD_OUT) < 0.1
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load(tmp_path / "second")), logits(model))
    summary = inspect_checkpoint(tmp_path / "packed")
    packed = sum(map(len, model.hf_quantizer.selection.recipes.values()))
    assert len(summary.packed) == packed - (kind == "llama_tied")  # tied weights are stored once
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert written["activation"] == settings.get("activation", "dynamic")
    assert HfqConfig.from_dict(written) == model.hf_quantizer.quantization_config


@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_smoothing_takes_outliers_away(activation: str, tokens: Tensor, tmp_path: Path) -> None:
    reference = build("llama")
    with_outliers(reference).save_pretrained(tmp_path)
    assert error(load(tmp_path), reference, tokens) < 1e-5
    data = tokens if activation == "static" else None
    naive = quantize(tmp_path, data, method="rtn", format="int8", activation=activation)
    smooth = quantize(tmp_path, tokens, activation=activation)
    assert error(smooth, reference, tokens) < 0.25 * error(naive, reference, tokens)
    report = smooth.hf_quantizer.calibration
    notes = {weight.name.rpartition(".")[2]: weight.note for weight in report.weights}
    assert notes["q_proj"] == notes["v_proj"] == "scaled with input_layernorm"
    assert notes["down_proj"] == "scaled with mlp.up_proj"
    assert all(weight.error is not None and weight.error < 0.01 for weight in report.weights)


def test_layers_that_are_not_smoothed_know_what_they_read(tokens: Tensor, tmp_path: Path) -> None:
    """k and v read what was rescaled for q: their own statistics have to follow."""
    reference = build("llama")
    with_outliers(reference).save_pretrained(tmp_path)
    other = {"method": "gptq", "format": "int8", "activation": "static"}
    model = quantize(
        tmp_path, tokens, activation="static", overrides={r"(k|v|up|gate)_proj": other}
    )
    reports = {weight.name: weight for weight in model.hf_quantizer.calibration.weights}
    for name, weight in reports.items():
        assert weight.error is not None and weight.error < 0.01, name
    assert error(model, reference, tokens) < 0.05


def test_experts_have_scales_of_their_own(tokens: Tensor, tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    model = quantize(tmp_path, tokens, activation="static")
    (experts, *_) = (m for m in model.modules() if isinstance(m, QuantExperts))
    for base in ("gate_up_proj", "down_proj"):
        scales = experts.neutral_tensors(base)["weight_input_scale"]
        assert scales.shape == (4, 1) and len(scales.unique()) > 1 and bool((scales > 0).all())


@pytest.mark.parametrize("settings", [{}, {"activation": "static"}], ids=str)
def test_both_ways_of_quantizing_give_the_same(
    settings: dict[str, Any], tokens: Tensor, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    config = HfqConfig("smoothquant", dataset=tokens, num_samples=16, seqlen=32, **settings)
    report = hfq.quantize(tmp_path / "float", tmp_path / "packed", config)
    assert report.logit_difference == 0
    model = quantize(tmp_path / "float", tokens, num_samples=16, seqlen=32, **settings)
    model.save_pretrained(tmp_path / "other")
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("packed", "other")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_unfinished_run_goes_on_with_the_same_scales(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfq.calibration.run import Calibration

    build("llama").save_pretrained(tmp_path / "float")
    config = HfqConfig("smoothquant", activation="static", dataset=tokens, num_samples=16)
    hfq.quantize(tmp_path / "float", tmp_path / "whole", config)
    block = Calibration.block

    def stops(self: Calibration, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        block(self, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Calibration, "block", stops)
        hfq.quantize(tmp_path / "float", tmp_path / "resumed", config)
    hfq.quantize(tmp_path / "float", tmp_path / "resumed", config)
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("format_name", ["int8", "fp8"])
@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_adapters_train_on_top(
    activation: str, format_name: str, tokens: Tensor, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path)
    data = tokens if activation == "static" else None
    base = quantize(tmp_path, data, method="rtn", format=format_name, activation=activation)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens[:4], labels=tokens[:4]).loss
        loss.backward()
        gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients)
        assert any(bool(grad.any()) for grad in gradients if grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_dequantize_gives_a_plain_float_model(tokens: Tensor, tmp_path: Path) -> None:
    reference = build("llama")
    reference.save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", tokens, activation="static").dequantize()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert error(model, reference, tokens) < 0.02
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as tensors:
        assert not any("scale" in name for name in tensors.keys())  # noqa: SIM118


# ---- what is refused


def test_a_damaged_scale_is_named(tokens: Tensor, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", tokens, method="rtn", format="int8", activation="static")
    model.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_input_scale"
    save_file({**tensors, name: torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj: expected scales of activ"):
        load(tmp_path / "packed")
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj: the packed tensor 'weight_input_scale'"):
        load(tmp_path / "packed")


@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_activations_that_overflow_are_named(
    activation: str, tokens: Tensor, tmp_path: Path
) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e38
        model.model.layers[1].mlp.gate_proj.weight[0] *= 1e20
    model.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"mlp\.down_proj: the activations .* NaN"):
        quantize(tmp_path, tokens, activation=activation)


def test_a_layer_that_never_runs_needs_another_setting(tokens: Tensor, tmp_path: Path) -> None:
    from hfq.calibration.run import calibrate
    from hfq.integrations.selection import select_modules
    from hfq.integrations.transformers import _filled_twin

    model = build("llama")
    model.model.layers[0].mlp.extra = torch.nn.Linear(64, 64)
    recipes = select_modules(model, HfqConfig(format="int8", activation="static")).recipes
    with pytest.raises(CalibrationError, match=r"extra: this weight never ran.*activation='dyn"):
        calibrate(model, recipes, list(tokens), _filled_twin)


def test_static_scales_without_a_dataset_are_found_on_text_of_the_models_own(
    tmp_path: Path,
) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    config = HfqConfig(format="int8", activation="static", num_samples=4, seqlen=8)
    report = hfq.quantize(tmp_path / "float", tmp_path / "packed", config)
    model = load(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    packed = load(tmp_path / "packed", dtype=torch.float32)
    assert report.calibration is not None and report.calibration.sequences == 4
    tokens = torch.arange(6).unsqueeze(0)
    assert torch.equal(packed(tokens).logits, model(tokens).logits)


def test_data_is_refused_where_nothing_reads_it() -> None:
    with pytest.raises(ConfigError, match=r"uses no data.*or activation='static'"):
        HfqConfig(format="int8", activation="dynamic", dataset=["text"])
