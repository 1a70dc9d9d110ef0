"""`inspect_checkpoint`: what is there, and every damage by its name."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hfq import CheckpointError, HfqConfig
from hfq.core.errors import VersionError
from hfq.inspection import inspect_checkpoint
from hfq.nn.packed import PackedModule

SIZES = {
    "vocab_size": 40,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 20,
}


def quantized(model, folder, shard="1GB", **settings):
    """Save a random float model, load it quantized, save that; the loaded model."""
    model.save_pretrained(folder / "float")
    config = HfqConfig(**settings)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    loaded.save_pretrained(folder / "packed", max_shard_size=shard)
    return loaded


@pytest.fixture
def llama():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.fixture
def packed(llama, tmp_path):
    quantized(llama, tmp_path, group_size=16, sym=False)
    return tmp_path / "packed"


def edit(folder, change):
    """Rewrite the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3, "group_size": 16},
        {"bits": 8, "group_size": -1, "sym": False, "quantize_lm_head": True},
        {"format": "nf4", "double_quant": True, "group_size": 12},
        {"overrides": {"down_proj": {"bits": 2, "group_size": 7}, "q_proj": None}},
        {"quantize_embeddings": True, "format": "int8"},
        {"quantize_embeddings": True, "format": "fp8", "activation": "dynamic"},
        {"format": "spqr", "outliers": 0.02},
    ],
)
def test_the_headers_tell_what_the_model_knows(llama, tmp_path, settings):
    model = quantized(llama, tmp_path, **settings)
    summary = inspect_checkpoint(tmp_path / "packed")
    slots = {n: m.slots["weight"] for n, m in model.named_modules() if isinstance(m, PackedModule)}
    found = {weight.name: weight for weight in summary.packed}
    assert found.keys() == slots.keys() and slots
    for name, slot in slots.items():
        weight = found[name]
        assert (weight.format, weight.bits) == (slot.format, slot.spec.bits)
        assert weight.shape == slot.float_shape  # 40 and 48 columns fill whole bytes
        layout = slot.layout().values()
        assert weight.bytes == sum(math.prod(e.shape) * e.dtype.itemsize for e in layout)
    kept = {n for n in llama.state_dict() if n.removesuffix(".weight") not in slots}
    assert summary.kept.keys() == kept
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert summary.packed_bytes + summary.kept_bytes == sum(t.nbytes for t in stored.values())
    numbers = sum(p.numel() for p in llama.parameters())
    total = summary.packed_bytes + summary.kept_bytes
    assert summary.bits_per_weight == pytest.approx(8 * total / numbers)


def test_columns_that_do_not_fill_a_byte(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 41}))
    quantized(model, tmp_path, bits=2, group_size=20)
    shapes = {w.name: w.shape for w in inspect_checkpoint(tmp_path / "packed").packed}
    # 41 columns at 2 bits take 11 bytes, like 44; three groups of 20 fit both.
    assert shapes["model.layers.0.mlp.down_proj"] == (40, 44)
    quantized(model, tmp_path, bits=2, group_size=41)
    shapes = {w.name: w.shape for w in inspect_checkpoint(tmp_path / "packed").packed}
    assert shapes["model.layers.0.mlp.down_proj"] == (40, 41)


def test_stacks_of_experts(tmp_path):
    config = GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = GptOssForCausalLM(config)
    quantized(model, tmp_path, group_size=18)
    weights = {w.name: w for w in inspect_checkpoint(tmp_path / "packed").packed}
    assert weights["model.layers.1.mlp.experts.gate_up_proj"].shape == (3, 96, 40)
    assert weights["model.layers.1.mlp.experts.down_proj"].shape == (3, 40, 48)


def test_a_float_checkpoint(llama, tmp_path):
    llama.to(torch.bfloat16).save_pretrained(tmp_path)
    summary = inspect_checkpoint(tmp_path)
    assert summary.quantization is None and summary.packed == ()
    assert summary.bits_per_weight == 16
    assert "bfloat16" in summary.table()


def test_shards(llama, tmp_path):
    quantized(llama, tmp_path, shard="8KB")
    folder = tmp_path / "packed"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert len(inspect_checkpoint(folder).packed) == 14
    gone = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"shard {shards[1].name} is missing"):
        inspect_checkpoint(folder)
    save_file({"other": torch.zeros(1)}, shards[1])
    with pytest.raises(
        CheckpointError, match=f"{shards[1].name} lacks .* tensors of the index, such as"
    ):
        inspect_checkpoint(folder)
    shards[1].write_bytes(gone[:-1])
    with pytest.raises(CheckpointError, match="complete safetensors file"):
        inspect_checkpoint(folder)


def test_dict_and_table(packed):
    summary = inspect_checkpoint(packed)
    found = json.loads(json.dumps(summary.to_dict()))
    assert found["packed_bytes"] == summary.packed_bytes
    assert found["metadata"]["quantization_config"]["group_size"] == 16
    lines = summary.table().splitlines()
    assert max(map(len, lines)) <= 100
    assert any("model.layers.*.mlp.up_proj" in line and "  2  int" in line for line in lines)
    assert any("model.norm.weight" in line and "float32" in line for line in lines)


def test_the_base_model_comes_from_the_card(packed):
    assert "base_model" not in inspect_checkpoint(packed).metadata
    (packed / "README.md").write_text("---\nbase_model: org/name\nlicense: mit\n---\n# x\n")
    metadata = inspect_checkpoint(packed).metadata
    assert (metadata["base_model"], metadata["license"]) == ("org/name", "mit")
    (packed / "README.md").write_text("---\n: [\n---\n")
    assert "base_model" not in inspect_checkpoint(packed).metadata


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_files(packed, size):
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a complete"):
        inspect_checkpoint(packed)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("weight_scale", f"{Q}.weight: packed codes without {Q}.weight_scale"),
        ("weight_zero", f"{Q}: the packed tensor 'weight_zero' .* is missing"),
        ("weight", f"{Q}.weight_scale: the packed codes {Q}.weight are missing"),
    ],
)
def test_missing_companions(packed, key, message):
    edit(packed, lambda tensors: tensors.pop(f"{Q}.{key}"))
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(packed)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("weight", lambda t: t[:-1]),
        ("weight", lambda t: t[:, :-4]),
        ("weight", lambda t: t[..., 0]),
        ("weight_scale", lambda t: t[:, :-1]),
        ("weight_scale", lambda t: t.float()),
        ("weight_zero", lambda t: t[1:]),
    ],
)
def test_wrong_shapes_and_dtypes(packed, key, change):
    def apply(tensors):
        tensors[f"{Q}.{key}"] = change(tensors[f"{Q}.{key}"]).contiguous()

    edit(packed, apply)
    with pytest.raises(CheckpointError, match=Q):
        inspect_checkpoint(packed)


def test_tensors_that_the_config_does_not_know(packed):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"weight_zero: the quantization_config of .* has no such tensor"
    ):
        inspect_checkpoint(packed)
    config["quantization_config"].update(sym=False, modules_to_not_convert=["q_proj"])
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"keeps .*q_proj. in float"):
        inspect_checkpoint(packed)


def test_newer_formats(packed):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(VersionError, match="version 99"):
        inspect_checkpoint(packed)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        inspect_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        inspect_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_are_never_opened(packed):
    (packed / "model.safetensors").unlink()
    (packed / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor an index"):
        inspect_checkpoint(packed)
    (packed / "pytorch_model.bin").rename(packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        inspect_checkpoint(packed)
