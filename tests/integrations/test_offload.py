"""device_map with parts on CPU and disk: the same logits, and a save that is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import modeling_utils

from hfq import HfqConfig
from hfq.nn.packed import PackedModule

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


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "while quantizing"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"format": "nf4", "double_quant": True}),
        ("llama", {"format": "spqr", "method": "rtn"}),
        ("llama_tied", {"quantize_embeddings": True}),
        ("mixtral", {}),
    ],
    ids=lambda value: str(value),
)
def test_parts_in_memory_for_a_gpu(
    kind: str,
    settings: dict[str, Any],
    packed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ``device_map="auto"`` what a GPU has no room for stays in memory and goes there for each call. Here the CPU is the GPU."""

    def dispatch(model: Any, *rest: Any) -> None:
        accelerate.dispatch_model(
            model,
            {"model": "cpu", "lm_head": "cpu"},
            main_device=torch.device("cpu"),  # to accelerate another one than "cpu"
            force_hooks=True,
            skip_keys=model._skip_keys_device_placement,
        )

    build(kind).save_pretrained(tmp_path / "float")
    whole = quantize(tmp_path / "float", settings)
    whole.save_pretrained(tmp_path / "packed")
    monkeypatch.setattr(modeling_utils, "accelerate_dispatch", dispatch)
    # Two devices by name, so that there is something to dispatch.
    places = {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}}
    if packed:
        model = load(tmp_path / "packed", **places)
    else:
        config = HfqConfig(**settings)
        model = load(tmp_path / "float", quantization_config=config, dtype=torch.float32, **places)
    assert all(
        p.is_meta for m in model.modules() if isinstance(m, PackedModule) for p in m.parameters()
    )
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-4)
    if kind == "llama_tied":
        return  # Transformers cannot save tied weights that are offloaded, those of float models neither
    model.save_pretrained(tmp_path / "second")
    monkeypatch.undo()
    assert stored_names(tmp_path / "second") == stored_names(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "second")), logits(whole))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"format": "nf4"}, {"format": "spqr", "method": "rtn"}])
def test_parts_in_memory_beside_a_gpu(
    settings: dict[str, Any], tmp_path: Path, cuda: torch.device
) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    whole = quantize(tmp_path / "float", settings)
    expected = logits(whole)
    whole.save_pretrained(tmp_path / "packed")
    places: dict[str, Any] = dict.fromkeys(MAPS["llama"], 0) | {"model.layers.1": "cpu"}
    for folder, config in (
        ("float", {"quantization_config": HfqConfig(**settings)}),
        ("packed", {}),
    ):
        model = load(tmp_path / folder, device_map=places, dtype=torch.float32, **config)
        for _ in range(2):
            torch.testing.assert_close(logits(model).cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_loaded_model_is_offloaded_and_fetched_back(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    model = quantize(tmp_path / "float", {})
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)


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
