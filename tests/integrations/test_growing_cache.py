"""Steps with native decode code fill Transformers' growing cache as its own code does, and what others hold of it never changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hfq.integrations import decode, growing_cache
from hfq.kernels import native

from .decode_models import prompt

pytestmark = pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels")


def step(model: Any, cache: DynamicCache, token: int = 5) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([[token]]), past_key_values=cache).logits
    return logits


def filled(model: Any, length: int = 9) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt(length), past_key_values=cache)
    return cache


def test_a_cache_grows_in_place_and_beyond(llama: PreTrainedModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(growing_cache, "_LEAST_ROOM", 3)
    expected, found = filled(llama), filled(llama)
    for token in range(3, 40):
        decode.remove(llama)
        theirs = step(llama, expected, token)
        decode.install(llama)
        torch.testing.assert_close(step(llama, found, token), theirs, rtol=1e-4, atol=1e-5)
        for ours, other in zip(found.layers, expected.layers, strict=True):
            torch.testing.assert_close(ours.keys, other.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.values, other.values, rtol=1e-4, atol=1e-5)
        assert found.get_seq_length() == expected.get_seq_length()


def test_what_was_seen_of_a_cache_never_changes(llama: PreTrainedModel) -> None:
    decode.install(llama)
    cache = filled(llama)
    step(llama, cache)
    seen = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    deep = copy.deepcopy(cache)
    first = step(llama, cache, 7)
    # Cropped to before the last token and continued otherwise: what was taken before stays.
    taken = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    step(llama, cache, 9)
    step(llama, cache, 11)
    for tensor, copied in seen + taken:
        assert torch.equal(tensor, copied)
    # Copies go on from where they were made.
    for each in (other, deep):
        assert torch.equal(step(llama, each, 7), first)


def test_a_cache_from_inference_mode_goes_on_outside(llama: PreTrainedModel) -> None:
    decode.install(llama)
    with torch.inference_mode():
        cache = filled(llama)
        step(llama, cache)
    first = step(llama, cache)
    with torch.inference_mode():
        step(llama, cache)
    assert first.isfinite().all() and cache.get_seq_length() == 12


def test_other_caches_keep_their_own_way(llama: PreTrainedModel) -> None:
    decode.install(llama)
    cache = StaticCache(config=llama.config, max_cache_len=20)
    with torch.no_grad():
        llama(**prompt(9), past_key_values=cache)
    step(llama, cache)
    assert all(layer.keys.shape[2] == 20 for layer in cache.layers)
    assert not any(hasattr(layer, "_hfq_memory") for layer in cache.layers)
