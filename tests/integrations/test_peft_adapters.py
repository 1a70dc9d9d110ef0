"""Adapters of packed models: several at once, on other layers than the decoder's, from checkpoints on disk."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear
from hfq.training.merge import merge_to_float

from .peft_models import (
    RANDOM,
    close,
    close_gradients,
    gradients,
    load,
    packed_state,
    same,
    with_lora,
)

# PEFT and TRL still use the names that Transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)


def test_adapters_of_a_packed_checkpoint(checkpoint: Path, ids: Tensor, tmp_path: Path) -> None:
    """From a packed checkpoint on disk, through every door that PEFT and Transformers have."""
    load(checkpoint).save_pretrained(tmp_path / "base")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(ids).logits, logits)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(tmp_path / "adapter")
    close(native.eval()(ids).logits, logits)
    native.disable_adapters()
    close(native(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits)


def test_several_adapters(checkpoint: Path, ids: Tensor) -> None:
    plain = load(checkpoint).eval()(ids).logits
    model = with_lora(load(checkpoint)).eval()
    torch.manual_seed(3)
    model.add_adapter("b", LoraConfig(**{**RANDOM, "r": 8, "target_modules": "all-linear"}))
    first = model(ids).logits
    model.set_adapter("b")
    second = model(ids).logits
    assert (first - second).norm() > 0.01 * first.norm()
    with model.disable_adapter():
        close(model(ids).logits, plain)
    mixed = model(ids, adapter_names=["default", "b", "__base__"]).logits
    for row, wanted in enumerate((first, second, plain)):
        close(mixed[row], wanted[row])
    model.add_weighted_adapter(["default", "b"], [1.0, 0.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    close(model(ids).logits, first)
    model.delete_adapter("b")
    close(model(ids).logits, first)


def test_adapter_on_packed_embeddings(checkpoint: Path, ids: Tensor, tmp_path: Path) -> None:
    settings = {"quantize_embeddings": True, "quantize_lm_head": True, "bits": 8}
    base = load(checkpoint, **settings)
    assert isinstance(base.model.embed_tokens, QuantEmbedding) and isinstance(
        base.lm_head, QuantLinear
    )
    model = with_lora(base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    before = packed_state(model)
    twin = copy.deepcopy(model)
    merge_to_float(twin)
    close_gradients(gradients(model, ids), gradients(twin, ids), 1e-4)
    assert same(packed_state(model), before)
    logits = model.eval()(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT saves the embedding beside the adapter and says so
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    reloaded = PeftModel.from_pretrained(load(checkpoint, **settings), tmp_path).eval()
    close(reloaded(ids).logits, logits)
    merge_to_float(model)
    close(model.merge_and_unload().eval()(ids).logits, logits)


def test_a_packed_layer_cannot_be_a_module_to_save(checkpoint: Path) -> None:
    """It would train nothing; the error comes before training."""
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require"):
        with_lora(load(checkpoint), target_modules=["v_proj"], modules_to_save=["q_proj"])


def test_float_layers_can_be_modules_to_save(checkpoint: Path, ids: Tensor) -> None:
    model = with_lora(
        load(checkpoint), target_modules=["v_proj"], modules_to_save=["lm_head"]
    ).train()
    assert any("lm_head" in name for name in gradients(model, ids))
