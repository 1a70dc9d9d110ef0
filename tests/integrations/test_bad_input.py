"""Bad input gives one clear error of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hfq import CheckpointError, ConfigError, HfqConfig, KernelError, VersionError, WeightError

from .test_roundtrip import quantize
from .tiny_models import build


@pytest.fixture
def float_folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def packed_folder(float_folder: Path, tmp_path: Path) -> Path:
    quantize(float_folder, {}).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, float_folder: Path) -> None:
    file = float_folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=name.replace(".", r"\.")) as raised:
        quantize(float_folder, {})
    assert "finite" in str(raised.value) and "overrides" in str(raised.value)


def test_truncated_checkpoint(packed_folder: Path) -> None:
    file = packed_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(packed_folder)


def test_truncated_float_checkpoint(float_folder: Path) -> None:
    file = float_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="complete safetensors file"):
        quantize(float_folder, {})


@pytest.mark.parametrize("damage", ["shape", "dtype", "missing"])
def test_packed_tensor_that_does_not_fit(damage: str, packed_folder: Path) -> None:
    file = packed_folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    if damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif damage == "dtype":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"].float()
    else:
        # The codes alone look like a float weight of a strange shape.
        tensors[name] = tensors[name][:8].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj") as raised:
        AutoModelForCausalLM.from_pretrained(packed_folder)
    assert "expected" in str(raised.value)


def test_codes_without_their_scales(packed_folder: Path) -> None:
    file = packed_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_scale"):
        AutoModelForCausalLM.from_pretrained(packed_folder)


def test_newer_format_version(packed_folder: Path) -> None:
    config = json.loads((packed_folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (packed_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VersionError, match="upgrade"):
        AutoModelForCausalLM.from_pretrained(packed_folder)


def test_unknown_setting_in_a_checkpoint(packed_folder: Path) -> None:
    config = json.loads((packed_folder / "config.json").read_text())
    config["quantization_config"]["grop_size"] = 32
    (packed_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="Did you mean 'group_size'"):
        AutoModelForCausalLM.from_pretrained(packed_folder)


def test_pickles_are_not_opened(packed_folder: Path) -> None:
    tensors = load_file(packed_folder / "model.safetensors")
    (packed_folder / "model.safetensors").unlink()
    torch.save(tensors, packed_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(packed_folder)


def test_a_tied_head_cannot_be_packed_alone(tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path / "float")
    with pytest.raises(ConfigError, match="quantize_embeddings=True"):
        quantize(tmp_path / "float", {"quantize_lm_head": True})


def test_scales_beyond_float16(float_folder: Path) -> None:
    file = float_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e9
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="scale_dtype='float32'"):
        quantize(float_folder, {})
    model = quantize(float_folder, {"scale_dtype": "float32"})
    assert torch.isfinite(model.model.layers[1].mlp.down_proj.weight + 0).all()


def test_a_config_of_hfq_keeps_its_kernel_mode(float_folder: Path) -> None:
    model = quantize(float_folder, {"kernel_mode": "int8"})
    assert model.model.layers[0].mlp.up_proj.kernel_mode == "int8"
    assert "kernel_mode" not in HfqConfig(kernel_mode="int8").to_dict()


def test_a_model_that_was_shared_out_is_not_saved(
    packed_folder: Path, tmp_path: Path, one_process: torch.distributed.DeviceMesh
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    fully_shard(model, mesh=one_process)
    with pytest.raises(KernelError, match="save it before"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("packed", [True, False])
def test_weights_that_are_to_be_loaded_in_parts(
    packed: bool, packed_folder: Path, float_folder: Path
) -> None:
    folder = packed_folder if packed else float_folder
    config = AutoConfig.from_pretrained(folder)
    config.distributed_config = DistributedConfig(tp_size=1)
    settings = (
        {"config": config} if packed else {"config": config, "quantization_config": HfqConfig()}
    )
    AutoModelForCausalLM.from_pretrained(folder, **settings)
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ConfigError, match=r"tp_size=2.*fully_shard"):
        AutoModelForCausalLM.from_pretrained(folder, **settings)
