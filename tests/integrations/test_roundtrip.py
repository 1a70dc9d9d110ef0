"""Quantize while loading -> save -> load: the same logits, on every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hfq import HfqConfig
from hfq.nn.packed import PackedModule

from .tiny_models import CONFIGS, build, load, stored_names

IDS = torch.arange(34).view(2, 17)

CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in CONFIGS),
    (
        "llama",
        {
            "format": "nf4",
            "double_quant": True,
            "quantize_lm_head": True,
            "quantize_embeddings": True,
        },
    ),
    ("llama", {"method": "hqq", "bits": 3, "group_size": 40}),
    (
        "llama",
        {"format": "int8", "overrides": {r"q_proj": {"format": "fp4"}, r"layers\.0\.mlp": None}},
    ),
    ("llama_tied", {"quantize_embeddings": True}),
    ("llama_tied", {"quantize_embeddings": True, "bits": 3, "sym": False}),
    ("gpt2", {"quantize_embeddings": True, "group_size": -1}),
    ("mixtral", {"group_size": 40, "sym": False, "bits": 3}),
    ("qwen3_moe", {"overrides": {r"layers\.0\.mlp\.experts": None}}),
    ("gpt_oss", {"format": "int8"}),
    *((kind, {"format": "int8", "activation": "dynamic"}) for kind in CONFIGS),
    (
        "llama_tied",
        {"format": "int8", "activation": "dynamic", "quantize_embeddings": True},
    ),
    (
        "llama",
        {
            "format": "int8",
            "activation": "dynamic",
            "quantize_lm_head": True,
            "overrides": {"down_proj": {"activation": None}, "o_proj": {"format": "int"}},
        },
    ),
    *((kind, {"format": "fp8", "activation": "dynamic"}) for kind in CONFIGS),
    ("mixtral", {"format": "fp8"}),
    ("gpt2", {"format": "fp8", "quantize_embeddings": True}),
    (
        "llama_tied",
        {
            "format": "fp8",
            "activation": "dynamic",
            "quantize_embeddings": True,
            "overrides": {"down_proj": {"activation": None}, "o_proj": {"format": "int"}},
        },
    ),
    ("llama_tied", {"format": "spqr", "bits": 4, "outliers": 0.05, "quantize_embeddings": True}),
    ("gpt2", {"format": "spqr", "bits": 4, "group_size": 12, "stat_group_size": 8}),
    ("mixtral", {"format": "spqr", "bits": 4}),
]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def quantize(folder: Path, settings: dict[str, Any]) -> PreTrainedModel:
    return load(folder, quantization_config=HfqConfig(**settings), dtype=torch.float32)


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_save_and_load_give_the_same_logits(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    reference = build(kind)
    reference.save_pretrained(tmp_path / "float", max_shard_size="100KB")
    model = quantize(tmp_path / "float", settings)
    expected = logits(model)
    assert 0 < (expected - logits(reference)).norm() / expected.norm() < 0.5

    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    assert torch.equal(logits(model), expected), "saving changed the model"
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), expected)
    assert again.dtype == torch.float32
    assert not any(
        p.requires_grad
        for m in again.modules()
        if isinstance(m, PackedModule)
        for p in m.parameters()
    )

    again.save_pretrained(tmp_path / "second")
    assert stored_names(tmp_path / "second") == stored_names(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "second")), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_dequantize_gives_a_plain_float_model(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", {"quantize_embeddings": True})
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        at_load = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", quantization_config=HfqConfig(dequantize=True)
        )
    for floated in (model.dequantize(), at_load):
        assert not any(isinstance(module, PackedModule) for module in floated.modules())
        torch.testing.assert_close(logits(floated), expected, atol=1e-5, rtol=1e-4)
        floated.save_pretrained(tmp_path / "again")
        assert stored_names(tmp_path / "again") == stored_names(tmp_path / "float")
        assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
        assert torch.equal(logits(load(tmp_path / "again")), logits(floated))


def test_tied_weights_are_stored_and_held_once(tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", {"quantize_embeddings": True})
    model.save_pretrained(tmp_path / "packed")
    assert not any(name.startswith("lm_head") for name in stored_names(tmp_path / "packed"))
    again = load(tmp_path / "packed")
    for each in (model, again, again.to(torch.bfloat16)):
        assert each.lm_head.qweight.data_ptr() == each.model.embed_tokens.qweight.data_ptr()
    assert torch.isfinite(logits(again)).all()


# ---- other processes: one each for all of the cases, because imports take seconds

DATA = torch.arange(240).view(8, 30) % 128
LOADED: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "static": {"method": "smoothquant", "activation": "static", "dataset": DATA},
    "spqr": {"method": "spqr", "group_size": 8, "outliers": 0.02, "dataset": DATA},
}
_WITH_HFQ = """
import sys, torch, hfq
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save(model(torch.arange(34).view(2, 17)).logits, folder + "/logits.pt")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits of the quantized model, and of a new process that loads what it saved."""
    folder, expected = tmp_path_factory.mktemp("loaded"), {}
    build("llama").save_pretrained(folder / "float")
    for name, settings in LOADED.items():
        model = quantize(folder / "float", settings)
        expected[name] = logits(model)
        model.save_pretrained(folder / name)
    subprocess.run(
        [sys.executable, "-c", _WITH_HFQ, *(str(folder / name) for name in LOADED)], check=True
    )
    return {
        name: (logits, torch.load(folder / name / "logits.pt")) for name, logits in expected.items()
    }


@pytest.mark.parametrize("name", LOADED)
def test_a_new_process_computes_the_same(
    name: str, found: dict[str, tuple[Tensor, Tensor]]
) -> None:
    expected, logits = found[name]
    assert bool(expected.isfinite().all()) and torch.equal(logits, expected)


UNKNOWN = {
    "llama": ("llama", {}),
    "int8": ("llama", {"format": "int8"}),
    "fp8": ("llama", {"format": "fp8"}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", {}),
    "gpt_oss": ("gpt_oss", {}),
}
_WITHOUT_HFQ = """
import json, sys
from transformers import AutoModelForCausalLM
answers = {}
for name in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/" + name)
        answers[name] = "it was loaded"
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"
assert "hfq" not in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process that does not import hfq says about each folder."""
    folder = tmp_path_factory.mktemp("unknown")
    for name, (kind, settings) in UNKNOWN.items():
        build(kind).save_pretrained(folder / f"{name}-float")
        quantize(folder / f"{name}-float", settings).save_pretrained(folder / name)
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_HFQ, str(folder), *UNKNOWN],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    answers: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("name", UNKNOWN)
def test_without_hfq_a_packed_checkpoint_raises(name: str, answers: dict[str, str]) -> None:
    assert answers[name].startswith("RuntimeError: ") and "mismatch" in answers[name], answers[name]


# ---- details


def test_config_survives_json(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    settings = {"bits": 5, "sym": False, "overrides": {"q_proj": {"bits": 8}, "k_proj": None}}
    quantize(tmp_path / "float", settings).save_pretrained(tmp_path / "packed")
    stored = AutoConfig.from_pretrained(tmp_path / "packed").quantization_config
    assert HfqConfig.from_dict(stored) == HfqConfig(**settings)


def test_generation_and_a_dict_as_config(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    model = load(
        tmp_path / "float",
        quantization_config={"quant_method": "hfq", "bits": 8},
        dtype=torch.bfloat16,
    )
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 23)


def test_a_head_that_the_checkpoint_lacks_stays_float(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    build("llama").save_pretrained(tmp_path / "float")
    quantize(tmp_path / "float", {}).save_pretrained(tmp_path / "packed")
    for folder, settings in (("packed", {}), ("float", {"quantization_config": HfqConfig()})):
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / folder, num_labels=3, pad_token_id=0, **settings
        )
        assert type(model.score) is torch.nn.Linear
        assert isinstance(model.model.layers[0].mlp.up_proj, PackedModule)
        assert torch.isfinite(model(IDS).logits).all()
        assert model.hf_quantizer.selection.kept["score"] == "not in the checkpoint"


def test_the_base_model_loads_from_a_causal_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModel

    build("llama").save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", {})
    model.save_pretrained(tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path / "base")(IDS).last_hidden_state,
        base(IDS).last_hidden_state,
    )


def test_compile_fullgraph(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", {})
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(IDS, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama").to(dtype).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=HfqConfig(), dtype="auto")
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))
