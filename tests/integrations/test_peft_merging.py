"""Adapters merged into packed weights, which rounds, and into float ones, which is exact."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hfq import HfqConfig
from hfq.core.errors import WeightError
from hfq.core.spec import IntSpec
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear
from hfq.nn.packed import PackedModule
from hfq.training.merge import merge_to_float

from .peft_models import close, load, packed_state, same, with_lora

# PEFT and TRL still use the names that Transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)


def test_merging_into_the_format_warns_once_and_is_measured(checkpoint: Path, ids: Tensor) -> None:
    model = with_lora(load(checkpoint)).eval()
    logits = model(ids).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        merged = model.merge_and_unload(safe_merge=True).eval()
    ours = [w for w in caught if "merge_to_float" in str(w.message)]
    assert len(ours) == 1
    assert isinstance(merged.model.layers[0].self_attn.q_proj, QuantLinear)
    error = ((merged(ids).logits - logits).norm() / logits.norm()).item()
    assert 1e-3 < error < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_to_float_is_exact_and_saves_a_plain_model(
    checkpoint: Path, ids: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = with_lora(load(checkpoint, dtype)).eval()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernel_mode = "exact"
    logits = model(ids).logits
    merge_to_float(model)
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    close(model(ids).logits, logits, 1e-5 if dtype == torch.float32 else 0.02)
    merged = model.merge_and_unload().eval()
    close(merged(ids).logits, logits, 1e-5 if dtype == torch.float32 else 0.05)
    merged.save_pretrained(tmp_path)
    assert not hasattr(LlamaConfig.from_pretrained(tmp_path), "quantization_config")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(plain(ids).logits, merged(ids).logits)


def test_merging_to_float_by_hand_keeps_ties(ids: Tensor) -> None:
    """A model that was packed without from_pretrained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    spec = IntSpec(group_size=16)
    head = QuantLinear.from_linear(model.lm_head, format="int", spec=spec)
    table = QuantEmbedding.from_embedding(model.model.embed_tokens, format="int", spec=spec)
    table.share_packed(head)
    model.lm_head, model.model.embed_tokens = head, table
    logits = model(ids).logits
    merge_to_float(model)
    close(model(ids).logits, logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_to_float_after_a_merge_is_refused(checkpoint: Path) -> None:
    model = with_lora(load(checkpoint))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(WeightError, match="merged"):
        merge_to_float(model)
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_merging_into_transposed_layers(tmp_path: Path, ids: Tensor) -> None:
    """GPT-2's Conv1D: packed as a Linear, float again as a Conv1D; one of its matrices is square."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HfqConfig(bits=4, group_size=16), dtype=torch.float32
    )
    model = with_lora(base, target_modules=["c_attn", "c_proj", "c_fc"]).eval()
    logits = model(ids).logits
    merge_to_float(model)
    close(model(ids).logits, logits)
    close(model.merge_and_unload().eval()(ids).logits, logits)


def test_an_adapter_with_nan_is_not_merged(checkpoint: Path) -> None:
    model = with_lora(load(checkpoint))
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    q_proj.lora_A["default"].weight.data.fill_(float("nan"))
    before = packed_state(q_proj)
    with pytest.raises(WeightError, match="finite"):
        q_proj.merge()
    assert not q_proj.merged and same(packed_state(q_proj), before)
