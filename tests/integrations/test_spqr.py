"""Method ``spqr`` as a user meets it: quantize, save, load, train, dequantize, and checkpoints that were damaged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import hfq
from hfq import CheckpointError, HfqConfig
from hfq.evaluation.size import weight_size
from hfq.kernels import native
from hfq.nn.packed import PackedModule

from .tiny_models import build, load

# PEFT asks Transformers by a name that 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)

IDS = torch.arange(34).view(2, 17)
SETTINGS = {"method": "spqr", "group_size": 8, "stat_group_size": 16, "outliers": 0.02}


def config() -> HfqConfig:
    tokens = torch.randint(0, 60, (8, 24), generator=torch.Generator().manual_seed(0))
    return HfqConfig(**SETTINGS, dataset=tokens, kernel_mode="exact")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to."""
    folder = tmp_path_factory.mktemp("spqr") / "float"
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path) -> PreTrainedModel:
    """Tests get copies."""
    return load(source, quantization_config=config(), dtype=torch.float32)


@pytest.fixture
def model(quantized: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(quantized)


@pytest.fixture
def packed(quantized: PreTrainedModel, tmp_path: Path) -> Path:
    quantized.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def test_a_loaded_checkpoint_is_the_model(model: PreTrainedModel, packed: Path) -> None:
    expected = logits(model)
    again = load(packed)
    assert torch.equal(logits(again), expected)
    written = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert {**written, **SETTINGS} == written and written["format"] == "spqr"
    assert HfqConfig(**written) == again.config.quantization_config
    kernel = "cpu_spqr" if native.load().cpu else "dequantize_spqr"
    assert {weight.kernel for weight in hfq.explain(again).weights} == {kernel}


def test_all_that_is_stored_counts(model: PreTrainedModel, packed: Path) -> None:
    stored = load_file(packed / "model.safetensors")
    names = {name for name, m in model.named_modules() if isinstance(m, PackedModule)}
    size = sum(
        t.nbytes
        for name, t in stored.items()
        if name.rpartition(".")[0] in names and not name.endswith(".bias")
    )
    assert weight_size(model).packed_bytes == size
    assert hfq.inspect_checkpoint(packed).packed_bytes == size


@pytest.mark.usefixtures("gate_in_this_process")
def test_block_by_block_is_the_same(source: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    report = hfq.quantize(source, tmp_path / "out", config(), dtype="float32")
    assert report.logit_difference == 0
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_casts_do_not_reach_what_is_packed(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    after = model.state_dict()
    packed = [name for name in before if "outlier" in name or name.endswith("_scale_stat")]
    assert packed and all(torch.equal(after[name], before[name]) for name in packed)
    assert model(IDS).logits.dtype == torch.bfloat16


def test_dequantized_it_answers_the_same(model: PreTrainedModel) -> None:
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_adapters_train_on_it(packed: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(packed), LoraConfig(target_modules="all-linear", r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_written_to_it_is_rounded_again(packed: Path) -> None:
    """As merging an adapter into the packed weight does."""
    layer = load(packed).model.layers[0].mlp.up_proj
    weight = layer.weight.materialize()
    with pytest.warns(UserWarning, match="rounded to its format again"):
        layer.weight.data += 0.01
    moved = layer.weight.materialize() - weight - 0.01
    assert moved.norm() < 0.3 * weight.norm()


def set_value(index: int, value: int) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor[index] = value

    return change


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("weight_outlier_count", set_value(0, 40), "add up to"),
        ("weight_outlier_count", set_value(0, -1), "counted from 0"),
        ("weight_outlier_column", set_value(0, -1), "must stand in columns 0 to"),
        ("weight_outlier_column", set_value(-1, 9999), "must stand in columns 0 to"),
        ("weight_outlier_column", lambda columns: columns.zero_(), "must ascend within each row"),
    ],
)
def test_damaged_indices_are_named(
    key: str, change: Callable[[Tensor], Any], message: str, packed: Path
) -> None:
    name = f"model.layers.1.mlp.down_proj.{key}"
    tensors = load_file(packed / "model.safetensors")
    change(tensors[name])
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.mlp\.down_proj: .*{message}"):
        load(packed)


def test_a_state_dict_is_checked_before_a_kernel_reads_it(model: PreTrainedModel) -> None:
    damaged = model.state_dict()
    name = "model.layers.1.mlp.down_proj.weight_outlier_column"
    damaged[name] = torch.full_like(damaged[name], 12345)
    with pytest.raises(CheckpointError, match="must stand in columns 0 to"):
        model.load_state_dict(damaged)
        model(IDS)
