"""Tokens per second of a causal language model, one sequence at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .logits import input_device, position_limit

__all__ = ["DECODED", "Speed", "measure_speed", "measure_speed_within_limit"]

_PREFILLS = 3
_STEPS = 32
DECODED = _STEPS + 1  # tokens generated after the prompt: the model needs as many free positions
_BUDGET = 10.0  # seconds for each of the two measurements, past which no further repetition starts


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over repetitions.

    Attributes:
        prompt_tokens: length of the prompt, tokens.
        prefill_tokens_per_s: tokens of the prompt per second.
        decode_tokens_per_s: single-token steps per second on top of the prompt; None if the model returns no
            key/value cache.
    """

    prompt_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None


def measure_speed_within_limit(model: nn.Module, tokens: Tensor) -> Speed:
    """`measure_speed` on the first of `tokens`, int64 `[T]`, after which the model's positions allow decoding."""
    limit = position_limit(model)
    if limit is not None:
        tokens = tokens[: max(1, limit - DECODED)]
    return measure_speed(model, tokens.unsqueeze(0).to(input_device(model)))


@torch.no_grad()
def measure_speed(model: nn.Module, prompt: Tensor) -> Speed:
    """Time a prompt, int64 `[1, T]`, and the decoding after it, in the model's current mode and device."""
    out = model(input_ids=prompt, use_cache=True)  # warm-up: kernel choice, allocator
    cache = getattr(out, "past_key_values", None)
    decode = None if cache is None else _decode_seconds(model, out.logits[:, -1:].argmax(-1), cache)
    prefill = _median(lambda: model(input_ids=prompt, use_cache=True), prompt.device, _PREFILLS)
    return Speed(
        prompt_tokens=prompt.shape[1],
        prefill_tokens_per_s=prompt.shape[1] / prefill,
        decode_tokens_per_s=None if decode is None else 1 / decode,
    )


def _decode_seconds(model: nn.Module, token: Tensor, cache: Any) -> float:
    def step() -> None:
        nonlocal token, cache
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values

    step()
    return _median(step, token.device, _STEPS)


def _median(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median seconds of `run`."""
    seconds: list[float] = []
    while len(seconds) < repetitions and sum(seconds) < _BUDGET:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
