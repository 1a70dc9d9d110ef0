"""Room for tokens to come in Transformers' growing cache of keys and values.

`DynamicCache` copies all keys and values of a layer for each new token: 2 ms of a step of a 1B model after 200 tokens, eight times that for
eight sequences. Here they move into memory with room for more, of which the layer's `keys` and `values` are the first part, and
a new token is written behind them. Memory that anybody has seen is never written to: where the layer holds other tensors than those that it
was given here (it was cropped, reordered, filled by the model's own code), they move again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..kernels import decode  # noqa: F401 (defines the operator)

__all__ = ["append"]

# More room than tokens by a fourth: a token is copied four times, however long the text gets.
_LEAST_ROOM, _ROOM = 128, 4


@dataclass(slots=True)
class _Memory:
    """Attributes:
    all_keys, all_values: `[B, H, C, D]`.
    keys, values: their first tokens, as the layer holds them.
    """

    all_keys: Tensor
    all_values: Tensor
    keys: Tensor
    values: Tensor


def append(cache: Any, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Add one token to layer `index`, k `[B, H, 1, D]` and v `[B, 1, H D]`.

    Returns:
        Keys and values `[B, H, C, D]` and how many tokens of them there are; None, and nothing is done, if the cache is not an
        ordinary growing one that has seen a prompt.
    """
    plain = type(cache) is DynamicCache and not cache.offloading and index < len(cache.layers)
    if not plain or type(cache.layers[index]) is not DynamicLayer:
        return None
    layer: Any = cache.layers[index]
    if not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    if keys.dim() != 4 or keys.dtype != k.dtype or not keys.is_cpu or values.shape != keys.shape:
        return None
    if keys.shape[:2] != k.shape[:2] or keys.shape[3] != k.shape[3]:
        return None  # the cache says what is wrong
    length = keys.shape[2]
    memory: _Memory | None = layer.__dict__.get("_hfq_memory")
    if (
        memory is None
        or memory.keys is not keys
        or memory.values is not values
        or length == memory.all_keys.shape[2]
        or memory.all_keys.is_inference() != torch.is_inference_mode_enabled()
    ):
        memory = layer._hfq_memory = _Memory(_with_room(keys), _with_room(values), keys, values)
    torch.ops.hfq.append.default(memory.all_keys, memory.all_values, k, v, length)
    layer.keys = memory.keys = memory.all_keys.narrow(2, 0, length + 1)
    layer.values = memory.values = memory.all_values.narrow(2, 0, length + 1)
    return memory.all_keys, memory.all_values, length + 1


def _with_room(tokens: Tensor) -> Tensor:
    batch, heads, length, size = tokens.shape
    room = length + max(length // _ROOM, _LEAST_ROOM)
    made = tokens.new_empty((batch, heads, room, size))
    made[:, :, :length] = tokens
    return made
