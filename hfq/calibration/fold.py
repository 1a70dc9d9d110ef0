"""Rescaling channels of activations without changing what a block computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..nn.experts import expert_weights
from .sites import Site

__all__ = ["Folds", "fold"]

# How far outputs may move, relative to the largest, before a fold counts as wrong. A fold is exact in exact
# arithmetic; what is left is the rounding of the folded weights and of everything behind them.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


class Folds:
    """What weights are to be multiplied by when they are quantized: the stored ones are rounded to the model's dtype.

    Attributes:
        rows, columns: module name -> float32 `[N]`, `[K]`.
        originals: module name -> its weight before any fold.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.originals: dict[str, Tensor] = {}

    def weight(self, name: str, stored: Tensor, transposed: bool) -> Tensor:
        """The weight `[N, K]` in float32 with all folds, from full precision."""
        found = self.originals.get(name, stored)
        weight = (found.transpose(-2, -1) if transposed else found).float()
        if name in self.rows:
            weight = weight * self.rows[name].unsqueeze(-1)
        return weight * self.columns[name] if name in self.columns else weight

    def within(self, prefix: str) -> Folds:
        """The same by full names, for a block called `prefix`."""
        found = Folds()
        for mine, theirs in (
            (found.rows, self.rows),
            (found.columns, self.columns),
            (found.originals, self.originals),
        ):
            mine.update({f"{prefix}.{name}": tensor for name, tensor in theirs.items()})
        return found


@torch.no_grad()
def fold(
    block: nn.Module,
    site: Site,
    factors: Tensor,
    transposed: Mapping[str, bool],
    run: Callable[[], Tensor],
    folds: Folds,
) -> Tensor | None:
    """Multiply what consumers do with each channel by a factor, and have the producer divide by it.

    Args:
        factors: float32 `[K]`, equal where the site says that channels are.
        transposed: which of the modules have their weights as `[K, N]`.
        run: what the block adds to some activations, float32.
        folds: takes what was done.

    Returns:
        The factors that were really used, or None: the block's output was another afterwards, and nothing was changed.
    """
    names = (site.producer, *site.consumers)
    before = {
        name: {key: p.detach().clone() for key, p in block.get_submodule(name).named_parameters()}
        for name in names
    }
    expected = run()
    factors = _divide_producer(block.get_submodule(site.producer), site, factors, transposed)
    for name in site.consumers:
        _multiply_columns(block.get_submodule(name), factors, transposed.get(name, False))
    found = run()
    worst = (found - expected).abs().amax() / expected.abs().amax()
    # Written so that a NaN fails.
    if not bool(worst <= _TOLERANCE[next(block.parameters()).dtype]):
        for name, parameters in before.items():
            for key, parameter in block.get_submodule(name).named_parameters():
                parameter.copy_(parameters[key])
        return None
    for name in names:
        weight = before[name].get("weight")
        if weight is not None and weight.dim() == 2:
            folds.originals.setdefault(name, weight)
    for name in site.consumers:
        folds.columns[name] = folds.columns.get(name, 1.0) * factors
    if site.producer in transposed:
        rows = 1 / _of_producer(factors, site)
        folds.rows[site.producer] = folds.rows.get(site.producer, 1.0) * rows
    return factors


def _of_producer(factors: Tensor, site: Site) -> Tensor:
    """One factor for each channel of the producer."""
    if site.channels is None:
        return factors
    found = torch.ones(int(site.channels.max()) + 1, device=factors.device)
    return found.index_copy_(0, site.channels, factors)


def _divide_producer(
    module: nn.Module, site: Site, factors: Tensor, transposed: Mapping[str, bool]
) -> Tensor:
    """Divide; what the consumers have to multiply by, exactly."""
    weight = module.get_parameter("weight")
    bias = dict(module.named_parameters()).get("bias")
    by = _of_producer(factors, site)
    if weight.dim() == 2:
        weight.copy_(weight / (by if transposed[site.producer] else by.unsqueeze(1)))
        if bias is not None:
            bias.copy_(bias / by)
        return factors
    # A gain is rounded to the model's dtype: the consumers take the factor that it really stands for.
    old, gain = weight.float().clone(), _gain(module)
    new = ((old + gain) / by - gain).to(weight.dtype)
    exact = (old + gain) / (new.float() + gain)
    exact = torch.where(exact.isfinite() & (exact > 0), exact, by)
    weight.copy_(new)
    if bias is not None:
        bias.copy_(bias / exact)
    return exact


def _gain(module: nn.Module) -> float:
    """1 for norms that multiply by 1 + weight (Gemma), else 0: found by trying."""
    weight = module.get_parameter("weight")
    kept = weight.detach().clone()
    probe = torch.linspace(-1, 1, weight.shape[0], device=weight.device, dtype=weight.dtype)
    weight.zero_()
    bias = dict(module.named_parameters()).get("bias")
    shift = 0.0 if bias is None else bias
    zero = bool(((module(probe[None]) - shift) == 0).all())
    weight.copy_(kept)
    return 0.0 if zero else 1.0


def _multiply_columns(module: nn.Module, factors: Tensor, transposed: bool) -> None:
    stacks = expert_weights(module)
    if stacks:
        first = next(iter(stacks))
        weight = module.get_parameter(first)
        flipped = getattr(module, "is_transposed", False)
        weight.copy_(weight * (factors.unsqueeze(-1) if flipped else factors))
        return
    weight = module.get_parameter("weight")
    weight.copy_(weight * (factors.unsqueeze(-1) if transposed else factors))
