"""Where each tensor went: complete on every architecture, and nothing may be lost or made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hfq
from hfq import CheckpointError, HfqConfig
from hfq.integrations import streaming
from hfq.integrations.manifest import MANIFEST

from .tiny_models import CONFIGS, build, stored_names

pytestmark = pytest.mark.usefixtures("gate_in_this_process")


def quantized(folder: Path, **settings: Any) -> dict[str, Any]:
    config = HfqConfig(group_size=32, **settings)
    hfq.quantize(folder / "float", folder / "out", config, dtype="float32")
    written: dict[str, Any] = json.loads((folder / "out" / MANIFEST).read_text())
    return written


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("sharded", [True, False])
def test_every_tensor_of_both_sides(
    kind: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sharded:
        monkeypatch.setattr(streaming, "_SINGLE_FILE_BYTES", 0)
    build(kind).save_pretrained(tmp_path / "float", max_shard_size="50KB")
    found = quantized(tmp_path, quantize_embeddings=kind == "llama_tied")
    sources, outputs = found["sources"], found["outputs"]
    assert sorted(sources) == stored_names(tmp_path / "float")
    assert sorted(outputs) == stored_names(tmp_path / "out")
    for side, entries in (("float", sources), ("out", outputs)):
        for name, entry in entries.items():
            with safe_open(tmp_path / side / entry["file"], framework="pt") as file:
                tensor = file.get_tensor(name)
            assert entry["shape"] == list(tensor.shape)
            assert f"torch.{entry['dtype']}" == str(tensor.dtype)
    for name, entry in sources.items():
        assert entry["outputs"] and not entry["dropped"], name
        for output in entry["outputs"]:
            packed = outputs[output]["format"].startswith("int, 4 bits, groups of 32, ")
            assert packed == (len(entry["outputs"]) > 1) and packed == (
                outputs[output]["dtype"] != "float32"
            )
    # A tensor that was not touched has kept its name.
    (norm,) = [name for name in sources if name.endswith(("model.norm.weight", "ln_f.weight"))]
    assert sources[norm]["outputs"] == [norm]


def test_merged_experts_share_their_outputs(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "float")
    sources = quantized(tmp_path)["sources"]
    merged = "model.layers.0.block_sparse_moe.experts.gate_up_proj"
    names = [name for name, each in sources.items() if merged in each["outputs"]]
    assert len(names) == 4 * 2 and all(".w1." in name or ".w3." in name for name in names)
    assert all(sources[name]["outputs"] == [merged, f"{merged}_scale"] for name in names)


def test_a_tied_copy_in_the_file_is_dropped(tmp_path: Path) -> None:
    for packed in (False, True):
        folder = tmp_path / str(packed)
        changed("llama_tied", folder, lambda t: {**t, "lm_head.weight": embedding(t).clone()})
        sources = quantized(folder, quantize_embeddings=packed)["sources"]
        assert sources["lm_head.weight"]["outputs"] == []
        assert sources["lm_head.weight"]["dropped"].startswith("tied to model.embed_tokens.")
        assert sources["model.embed_tokens.weight"]["outputs"][0] == "model.embed_tokens.weight"


def test_what_the_architecture_does_not_use_is_dropped(tmp_path: Path) -> None:
    for kind, name in (
        ("gpt2", "transformer.h.0.attn.bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        changed(kind, tmp_path / kind, lambda t, name=name: {**t, name: torch.zeros(2)})
        entry = quantized(tmp_path / kind)["sources"][name]
        assert entry["dropped"].endswith("does not use it")
        assert not entry["outputs"]


# ---- what must fail


def changed(kind: str, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """A checkpoint in one file whose tensors were changed."""
    build(kind).save_pretrained(folder / "float")
    file = folder / "float" / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def embedding(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["model.embed_tokens.weight"]


def test_a_tensor_without_a_use_is_refused(tmp_path: Path) -> None:
    changed("llama", tmp_path, lambda t: {**t, "model.layers.0.extra.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"1 tensors that LlamaForCausalLM has no .*0\.extra"):
        quantized(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    changed("llama", tmp_path, lambda t: {**t, "norm.weight": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected 64 numbers, got 128"):
        quantized(tmp_path)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in sorted(tensors) if ".experts.2.w1" in name)]

    changed("mixtral", tmp_path, without)
    with pytest.raises(CheckpointError, match=r"gate_up_proj: expected 49152 numbers, got 43008"):
        quantized(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"norm\.weight: its model\.norm\.weight was not"),
        (
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale", None),
            r"up_proj\.weight: its model\.layers\.0\.mlp\.up_proj\.weight_scale was not written",
        ),
        (lambda t: t.update(made_up=torch.ones(2)), "made_up: it was written and comes from no"),
    ],
)
def test_what_is_lost_or_made_up_on_the_way_is_refused(
    change: Callable[[dict[str, Tensor]], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    written = streaming._Run._write_weights

    def damaged(self: Any, folder: Path) -> None:
        written(self, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(streaming._Run, "_write_weights", damaged)
    with pytest.raises(CheckpointError, match=message):
        quantized(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_source_that_leads_nowhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    monkeypatch.setattr(
        streaming,
        "manifest",
        lambda model, files, parameters, *others: hfq.integrations.manifest.manifest(
            model, files, {k: v for k, v in parameters.items() if "norm" not in k}, *others
        ),
    )
    with pytest.raises(CheckpointError, match=r"norm\.weight: it became no tensor of what was"):
        quantized(tmp_path)
