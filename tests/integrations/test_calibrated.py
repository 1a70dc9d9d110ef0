"""Calibrated methods in ``from_pretrained``: every architecture, poor data, and what the user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfq import CalibrationError, ConfigError, HfqConfig
from hfq.calibration.run import Calibration, calibrate
from hfq.integrations.selection import select_modules
from hfq.integrations.transformers import _filled_twin
from hfq.nn.packed import PackedModule

from .tiny_models import CONFIGS, build, load

HELD_OUT = torch.arange(34).view(2, 17)


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(128, (24, 32), generator=generator)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def quantize(folder: Path, dataset: Any, **settings: Any) -> PreTrainedModel:
    settings = {"method": "gptq", "group_size": 32, **settings}
    config = HfqConfig(dataset=dataset, kernel_mode="exact", **settings)
    return load(folder, quantization_config=config, dtype=torch.float32)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(HELD_OUT).logits


def packed_names(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedModule)}


CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in CONFIGS),
    ("llama", {"quantize_lm_head": True, "quantize_embeddings": True, "sym": False, "bits": 3}),
    ("llama", {"format": "nf4", "double_quant": True, "gptaq": 1.0}),
    ("llama", {"overrides": {r"q_proj": {"method": "rtn"}, r"layers\.0\.mlp": None}}),
    ("llama_tied", {"quantize_embeddings": True}),
    ("gpt2", {"group_size": -1, "format": "int8"}),
    ("mixtral", {"group_size": 40, "desc_act": False}),
    *((kind, {"group_size": 40, "static_groups": False}) for kind in ("llama", "mixtral")),
]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_save_and_load_give_the_same_logits(
    kind: str, settings: dict[str, Any], tokens: Tensor, tmp_path: Path
) -> None:
    reference = build(kind)
    reference.save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", tokens, **settings)
    rounded_settings = {
        k: v for k, v in settings.items() if k not in ("gptaq", "desc_act", "static_groups")
    }
    rounded = load(
        tmp_path / "float",
        quantization_config=HfqConfig(**{"group_size": 32, **rounded_settings}),
        dtype=torch.float32,
    )
    assert packed_names(model) == packed_names(rounded)
    expected = logits(model)
    assert 0 < (expected - logits(reference)).norm() / expected.norm() < 0.5

    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), expected)
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert written["method"] == "gptq" and "dataset" not in written
    assert written["calibration"]["sequences"] == 24 and written["calibration"]["tokens"] == 24 * 32


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_blocks_answer_more_like_the_float_ones_than_by_rounding(
    kind: str, tokens: Tensor, tmp_path: Path
) -> None:
    reference = build(kind)
    reference.save_pretrained(tmp_path)

    def error(**settings: Any) -> float:
        config = HfqConfig(bits=3, group_size=32, kernel_mode="exact", **settings)
        model = load(tmp_path, quantization_config=config, dtype=torch.float32)
        with torch.no_grad():
            return (model(tokens).logits - reference(tokens).logits).square().mean().item()

    assert error(method="gptq", dataset=tokens) < 0.8 * error()


def test_the_report_names_every_weight(folder: Path, tokens: Tensor) -> None:
    model = quantize(folder, tokens)
    report = model.hf_quantizer.calibration
    assert [weight.name for weight in report.weights][-1] == "model.layers.1.mlp.down_proj"
    assert {weight.name for weight in report.weights} == packed_names(model)
    for weight in report.weights:
        assert weight.method == "gptq" and weight.tokens == 24 * 32 and weight.damping == 0.01
        assert weight.error is not None and 0 < weight.error < 0.05 and not weight.note
    assert "model.layers.1.mlp.down_proj" in report.table()
    assert report.to_dict()["tokens"] == 24 * 32


def test_the_same_data_gives_the_same_codes(folder: Path, tokens: Tensor) -> None:
    first, second = (quantize(folder, tokens).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = quantize(folder, tokens.flip(1)).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_padding_is_left_out(folder: Path, tokens: Tensor) -> None:
    """Rows padded on the left or on the right give what the rows give alone."""
    padded, mask = torch.zeros(24, 40, dtype=torch.int64), torch.zeros(24, 40, dtype=torch.int64)
    padded[:12, :32], mask[:12, :32] = tokens[:12], 1
    padded[12:, 8:], mask[12:, 8:] = tokens[12:], 1
    entries = [
        {"input_ids": row, "attention_mask": kept} for row, kept in zip(padded, mask, strict=True)
    ]
    first, second = quantize(folder, tokens).state_dict(), quantize(folder, entries).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_data_the_model_writes_its_own(folder: Path) -> None:
    state = torch.random.get_rng_state()
    models = [quantize(folder, None, num_samples=5, seqlen=16, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    sums = [model.hf_quantizer.calibration.sha256 for model in models]
    assert sums[0] == sums[1] != sums[2]
    assert models[0].hf_quantizer.calibration.tokens == 5 * 16


@pytest.mark.parametrize("rows", [1, 2])
def test_very_little_data_is_still_a_model(folder: Path, rows: int) -> None:
    model = quantize(folder, torch.full((rows, 4), 7))
    difference = logits(model) - logits(build("llama"))
    assert difference.norm() / logits(model).norm() < 0.5


def test_experts_that_are_never_chosen_are_topped_up(tmp_path: Path) -> None:
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            # All tokens go to the experts 1 and 3.
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[1], layer.mlp.gate.weight[3] = 1e-3, -1e-3
    model.save_pretrained(tmp_path)
    quantized = quantize(tmp_path, torch.arange(128).view(4, 32))
    reports = [w for w in quantized.hf_quantizer.calibration.weights if "experts" in w.name]
    assert len(reports) == 4
    assert all(report.note.endswith("experts topped up") for report in reports), reports


def test_a_layer_that_never_runs_is_rounded_and_named(folder: Path, tokens: Tensor) -> None:
    """An MLP whose activation function is zero: its down projection reads nothing but zeros."""
    model = build("llama")
    model.model.layers[0].mlp.extra = torch.nn.Linear(64, 64)
    recipes = select_modules(model, HfqConfig(method="gptq", group_size=32)).recipes
    report = calibrate(model, recipes, list(tokens), _filled_twin)
    (extra,) = [weight for weight in report.weights if weight.name.endswith("extra")]
    assert extra.method == "rtn" and extra.note == "never ran on the calibration data"
    assert extra.error is None and extra.tokens == 0


def test_drift_is_followed_through_blocks_that_stay_float(tokens: Tensor) -> None:
    """The float model's hidden states move past every block, also where nothing is quantized."""
    model = build("llama")
    config = HfqConfig("gptq", group_size=32, gptaq=1.0, overrides={r"layers\.0\.": None})
    recipes = select_modules(model, config).recipes
    run = Calibration(model, recipes, _filled_twin, None)
    streams = run.start(list(tokens))
    run.block(0, streams)
    assert all(torch.equal(stream.wanted, stream.hidden) for stream in streams)
    run.block(1, streams)
    assert not any(torch.equal(stream.wanted, stream.hidden) for stream in streams)


def test_activations_that_overflow_are_named(tokens: Tensor, tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e38
        model.model.layers[1].mlp.gate_proj.weight[0] *= 1e20
    model.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj.*NaN, infinite or too"):
        quantize(tmp_path, tokens, scale_dtype="float32")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (torch.full((2, 8), 999), "expected token ids below 128, got 999"),
        ("missing.csv", r"expected a \.txt, \.jsonl or \.parquet file"),
        ([], "no text"),
        ([torch.tensor([3])], "no sequence of at least 2 tokens"),
    ],
)
def test_unusable_data_is_answered(folder: Path, dataset: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(folder, dataset)


def test_a_method_without_data_refuses_data() -> None:
    with pytest.raises(
        ConfigError, match=r"method 'rtn' uses no data: leave it out, or choose .*gptq"
    ):
        HfqConfig(dataset=["text"])
