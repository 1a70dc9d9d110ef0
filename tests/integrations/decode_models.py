"""Float models for native decode code, and what they generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from . import tiny_models

# What native code takes of the Llama's 20 tokens: a prompt and 19 steps, attention in the steps only.
CALLS = {"norm": 20 * 5, "gate": 20 * 2, "attention": 19 * 2}

SIZES: dict[str, Any] = {**tiny_models.SIZES, "pad_token_id": 0}


def llama_config() -> LlamaConfig:
    return LlamaConfig(**SIZES, attention_bias=True)


def model_of(make: Callable[[], Any]) -> PreTrainedModel:
    """A random model whose norms are no identities."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.3)
    return model


def prompt(*lengths: int) -> dict[str, Tensor]:
    """Sequences of these lengths, filled up from the left."""
    ids = torch.randint(
        3, 128, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1)
    )
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, *lengths: int, **settings: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20} | settings
    return model.generate(
        **prompt(*lengths), **settings, return_dict_in_generate=True, output_logits=True
    )


def counted(native_calls: dict[str, int]) -> dict[str, int]:
    """The calls since this was asked last."""
    found = dict(native_calls)
    native_calls.update(dict.fromkeys(native_calls, 0))
    return found


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5
    )
