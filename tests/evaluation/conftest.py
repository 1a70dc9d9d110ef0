"""Tiny random causal language models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hfq.algorithms import ALGORITHMS
from hfq.core.spec import IntSpec
from hfq.nn.linear import QuantLinear

VOCABULARY = 61


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Build a two-layer Llama with random weights; equal seeds give equal weights."""

    def make(seed: int = 0, **changed: int | bool) -> LlamaForCausalLM:
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Wide initial weights, so that predictions are not uniform.
            config = LlamaConfig(**{**settings, **changed}, initializer_range=0.5)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def pack_linears() -> Callable[..., LlamaForCausalLM]:
    """Replace the Linears of the decoder layers by packed ones, in place."""

    def pack(model: LlamaForCausalLM, bits: int = 4, group_size: int = 16) -> LlamaForCausalLM:
        spec = IntSpec(bits=bits, group_size=group_size)
        rtn = ALGORITHMS.get("rtn")
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                packed = QuantLinear.from_linear(
                    module,
                    format="int",
                    spec=spec,
                    encode=lambda rows: rtn.quantize(rows, spec, rtn.options),
                )
                parent = model.model.layers.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], packed)
        return model

    return pack


@pytest.fixture
def ids() -> Tensor:
    """150 random token ids: two windows of 64 and a rest."""
    return torch.randint(VOCABULARY, (150,), generator=torch.Generator().manual_seed(7))
