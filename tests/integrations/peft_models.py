"""A packed Llama with LoRA adapters, and what tests of it compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hfq import HfqConfig
from hfq.nn.packed import PackedModule

RANDOM = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def load(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
    config = HfqConfig(**{"bits": 4, "group_size": 16, **settings})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)


def with_lora(model: nn.Module, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(**{**RANDOM, "target_modules": "all-linear", **settings})
    )


def with_prompt(model: nn.Module) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


# Kinds of adapters, and of what they are on, that several processes train together.
ADAPTED: dict[str, Callable[[Path], PeftModel]] = {
    "lora": lambda path: with_lora(load(path)),
    "prompt": lambda path: with_prompt(load(path)),
    "spqr": lambda path: with_lora(load(path, format="spqr", method="rtn")),
}


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name.replace('base_model.model.', '').replace('.base_layer', '')}.{base}.{key}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for base in module.slots
        for key, tensor in module.neutral_tensors(base).items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    error = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()
    assert error <= tolerance, error


def close_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name], tolerance)
