"""Apply the transforms that the recipes of a block name: find the sites, choose the factors, fold them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms import TRANSFORMS, find_method
from ..config import Recipe
from ..core.errors import HfqError
from ..core.statistics import InputStatistics
from .blocks import BlockCall, run_block
from .fold import Folds, fold
from .sites import Site, find_sites

__all__ = ["rescale_block"]

# Of the random hidden states that sites are found and folds are checked with: the relations hold for any.
_SEED = 0


@torch.no_grad()
def rescale_block(
    block: nn.Module,
    recipes: Mapping[str, Recipe],
    statistics: dict[str, InputStatistics | None],
    transposed: Mapping[str, bool],
    call: BlockCall,
    hidden_like: Tensor,
) -> tuple[Folds, dict[str, str]]:
    """Rescale the channels of a block as its recipes say, in place.

    Args:
        block: with its float weights.
        recipes: for the linear layers of the block that are quantized, by their names in the block.
        statistics: of their inputs; entries of rescaled ones are replaced.
        transposed: for every linear layer of the block, whether its weight is `[K, N]`.
        call: the arguments of the block for a few tokens.
        hidden_like: hidden states for the same tokens, of which shape, dtype and device count.

    Returns:
        What weights are to be multiplied by, and for each consumer the name of its producer.
    """
    folds = Folds()
    producers: dict[str, str] = {}
    wanted = [
        name
        for name, recipe in recipes.items()
        if find_method(recipe.method).transform and statistics[name] is not None
    ]
    if not wanted:
        return folds, producers
    hidden = _random(hidden_like)
    for site in _sites(block, wanted, transposed, call, hidden):
        chosen = [name for name in site.consumers if name in wanted]
        methods = {recipes[name].method for name in chosen}
        known = statistics[chosen[0]]
        if len(methods) > 1 or known is None:
            continue
        transform = TRANSFORMS.get(str(find_method(methods.pop()).transform))
        weights = [
            (_weight(block, name, transposed[name], folds), recipes[name].spec) for name in chosen
        ]
        options = recipes[chosen[0]].options
        try:
            factors = transform.factors(weights, known, site.channels, options)
        except HfqError as error:
            raise type(error)(f"{chosen[0]}: {error}") from error
        if bool((factors == 1).all()):
            continue

        def run() -> Tensor:
            return (run_block(block, hidden, call) - hidden).float()

        used = fold(block, site, factors, transposed, run, folds)
        if used is not None:
            shared = known.rescaled(used)
            for name in site.consumers:
                if name in statistics:
                    statistics[name] = shared
                    producers[name] = site.producer
    return folds, producers


def _sites(
    block: nn.Module,
    wanted: list[str],
    transposed: Mapping[str, bool],
    call: BlockCall,
    hidden: Tensor,
) -> list[Site]:
    """Sites are found in float32: in 16 bits neighbouring factors could not be told apart."""
    twin = copy.deepcopy(block).float()
    call32 = replace(call, args=_float32(call.args), kwargs=_float32(call.kwargs))
    sizes = {}
    for name, flipped in transposed.items():
        first, second = twin.get_submodule(name).get_parameter("weight").shape
        sizes[name] = (second, first) if flipped else (first, second)
    run: Callable[[], Tensor] = lambda: run_block(twin, hidden.float(), call32)  # noqa: E731
    return find_sites(twin, run, wanted, sizes)


def _weight(block: nn.Module, name: str, flipped: bool, folds: Folds) -> Tensor:
    return folds.weight(name, block.get_submodule(name).get_parameter("weight").detach(), flipped)


def _random(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(like.shape, generator=generator).to(like)


def _float32(value: Any) -> Any:
    """Every float tensor in nested arguments as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_float32(item) for item in value)
    if isinstance(value, dict):
        return {key: _float32(item) for key, item in value.items()}
    return value
