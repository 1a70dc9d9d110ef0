"""device_map with parts on CPU and disk: the same logits, and a save that is complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hfq import HfqConfig

from .test_roundtrip import load, logits, quantize
from .tiny_models import build, stored_names

# Offloading warns about its memory use on every save.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

MAPS = {
    "llama": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "mixtral": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.parametrize("kind", MAPS)
def test_disk_offload_of_a_packed_checkpoint(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "float")
    whole = quantize(tmp_path / "float", {})
    whole.save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed", device_map=MAPS[kind], offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "second")
    assert stored_names(tmp_path / "second") == stored_names(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "second")), logits(whole))


@pytest.mark.parametrize("kind", MAPS)
def test_disk_offload_while_quantizing(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "float")
    whole = quantize(tmp_path / "float", {})
    model = load(
        tmp_path / "float",
        quantization_config=HfqConfig(),
        dtype=torch.float32,
        device_map=MAPS[kind],
        offload_folder=tmp_path / "offload",
    )
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(whole))


def test_automatic_device_map_counts_packed_bytes(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    model = load(
        tmp_path / "float",
        quantization_config=HfqConfig(),
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": "200KB"},
        offload_folder=tmp_path / "offload",
    )
    whole = quantize(tmp_path / "float", {})
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-4)


def test_explain_names_the_offloaded(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    quantize(tmp_path / "float", {}).save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed", device_map=MAPS["llama"], offload_folder=tmp_path / "offload")
    choice = model.model.layers[1].mlp.up_proj.kernel_choice("weight")
    assert choice.row.name == "dequantize"
    assert "offloaded" in choice.refused[0][1]
