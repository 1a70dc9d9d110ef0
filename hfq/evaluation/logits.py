"""Run a model on a window of tokens and refuse logits that mean nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import HfqError

__all__ = ["EvaluationError", "evaluating", "input_device", "position_limit", "window_logits"]


class EvaluationError(HfqError, RuntimeError):
    """A model gives no logits that could be evaluated: NaN, infinite, another vocabulary."""


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameter that is in memory (hooks move them on)."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that the model's config allows, if it names one."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _text_config(model: nn.Module) -> object:
    """The part of the config that is about text; None for a module that is not from Transformers."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@torch.no_grad()
def window_logits(model: nn.Module, ids: Tensor, name: str) -> Tensor:
    """Logits float `[B, T, V]` of token ids int64 `[B, T]`.

    Args:
        name: how errors call the model.

    Raises:
        EvaluationError: a token outside of the vocabulary; NaN or +inf among the logits.
    """
    _check_vocabulary(model, ids, name)
    logits = model(input_ids=ids.to(input_device(model)), use_cache=False).logits
    assert isinstance(logits, Tensor)
    # -inf is how some models rule out a token; anything else that is not finite is an accident.
    if bool(torch.isnan(logits).any()) or bool((logits == torch.inf).any()):
        raise EvaluationError(
            f"{name}: NaN or infinite logits; {_first_bad_module(model, ids)}. Quantize that module with more bits or "
            "keep it in float (modules_to_not_convert), or load the model in bfloat16 or float32 instead of float16"
        )
    return logits


def _check_vocabulary(model: nn.Module, ids: Tensor, name: str) -> None:
    vocabulary = getattr(_text_config(model), "vocab_size", None)
    if (
        isinstance(vocabulary, int)
        and ids.numel()
        and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
    ):
        raise EvaluationError(
            f"{name}: expected token ids from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}; "
            "the tokens come from another model's tokenizer"
        )


@torch.no_grad()
def _first_bad_module(model: nn.Module, ids: Tensor) -> str:
    """Run once more and name the first innermost module whose output is not finite."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [
        watch(name, module) for name, module in model.named_modules() if not list(module.children())
    ]
    try:
        model(input_ids=ids.to(input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return f"they begin in {found[0]!r}" if found else "every module's own output is finite"
