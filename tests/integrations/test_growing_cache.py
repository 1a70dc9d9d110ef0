"""Steps with native decode code fill Transformers' growing cache as its own code does, and what others hold of it never changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hfq.integrations import decode, growing_cache
from hfq.kernels import native

from .decode_models import prompt

pytestmark = pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels")


def step(model: Any, cache: Cache, token: int = 5) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([[token]]), past_key_values=cache).logits
    return logits


def filled(model: Any, length: int = 9) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt(length), past_key_values=cache)
    return cache


def places(cache: Cache) -> list[int]:
    return [each.data_ptr() for layer in cache.layers for each in (layer.keys, layer.values)]


def shallow(cache: DynamicCache) -> DynamicCache:
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def test_a_cache_grows_in_place_and_beyond(llama: PreTrainedModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(growing_cache, "_LEAST_ROOM", 3)
    expected, found = filled(llama), filled(llama)
    room = 9
    for length in range(9, 46):
        decode.remove(llama)
        theirs = step(llama, expected, length)
        decode.install(llama)
        before = places(found)
        torch.testing.assert_close(step(llama, found, length), theirs, rtol=1e-4, atol=1e-5)
        moved = [old != new for old, new in zip(before, places(found), strict=True)]
        assert moved == [length == room] * 4
        if length == room:
            room += max(room // 4, 3)
        for ours, other in zip(found.layers, expected.layers, strict=True):
            torch.testing.assert_close(ours.keys, other.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.values, other.values, rtol=1e-4, atol=1e-5)
        assert found.get_seq_length() == expected.get_seq_length() == length + 1


def test_what_was_seen_of_a_cache_never_changes(llama: PreTrainedModel) -> None:
    decode.install(llama)
    cache = filled(llama)
    step(llama, cache)
    seen = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    other, another, deep = shallow(cache), shallow(cache), copy.deepcopy(cache)
    before = places(cache)
    first = step(llama, cache, 7)
    assert places(cache) == before  # the new token stands behind what was seen
    # Cropped to before the last token and continued otherwise: what was taken before stays.
    taken = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    step(llama, cache, 9)
    step(llama, cache, 11)
    step(llama, another, 13)
    for tensor, copied in seen + taken:
        assert torch.equal(tensor, copied)
    # Copies go on from where they were made.
    for each in (other, deep):
        assert torch.equal(step(llama, each, 7), first)


def test_a_cache_from_inference_mode_goes_on_outside(llama: PreTrainedModel) -> None:
    """And back; in place where the mode is that of the step before."""
    expected, found, moves = filled(llama), DynamicCache(config=llama.config), []
    for token in range(3, 9):
        step(llama, expected, token)
    wanted = step(llama, expected, 9)
    decode.install(llama)
    with torch.inference_mode():
        llama(**prompt(9), past_key_values=found)
    for token, inference in enumerate((True, True, False, False, True, True, False), 3):
        before = places(found)
        with torch.inference_mode(inference):
            logits = step(llama, found, token)
        moves.append(places(found) != before)
        assert all(layer.keys.is_inference() == inference for layer in found.layers)
    assert moves == [True, False, True, False, True, False, True]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_other_caches_keep_their_own_way(
    llama: PreTrainedModel, native_calls: dict[str, int]
) -> None:
    decode.install(llama)
    cache = StaticCache(config=llama.config, max_cache_len=20)
    with torch.no_grad():
        llama(**prompt(9), past_key_values=cache)
    before = places(cache)
    step(llama, cache)
    assert native_calls["attention"] == 2
    assert places(cache) == before and all(layer.keys.shape[2] == 20 for layer in cache.layers)
    assert cache.get_seq_length() == 10
    assert not any(hasattr(layer, "_hfq_memory") for layer in cache.layers)
