"""Tiny random models of the architectures that hfq must take; float32, seconds to build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "llama_tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, **_ROUTED),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=16
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **_ROUTED, head_dim=16),
}

# Settings of ``gptq`` that take a fifth of the time. What they switch off changes which codes are chosen and not where
# they go, and has its tests in tests/algorithms.
QUICK = {"refine": 0, "scale_search": False}


def build(kind: str) -> PreTrainedModel:
    """A model of that architecture in which no parameter is zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    """Load and insist that no tensor was missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model


def stored_names(folder: Path) -> list[str]:
    """Names of all tensors in the safetensors files of a folder."""
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    return sorted(names)
