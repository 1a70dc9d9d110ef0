"""What the experts of a fused mixture-of-experts module read, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.statistics import InputStatistics
from ..kernels.moments import SecondMoment
from ..nn.experts import expert_weights
from .capture import RowSample, drawn_for
from .ranks import Ranks

__all__ = ["ExpertsCapture"]


# Tokens that are kept for each expert, where a method asks for them.
_SAMPLE = 64


class ExpertsCapture:
    """Context in which the inputs of both stacks of a float experts module are summed up for each expert.

    An expert that the router hardly chooses has seen too little to be rounded by: it also gets tokens that were sent to
    others, until it has seen as many as its first stack has columns.

    Args:
        module: a fused experts module, see `hfq.nn.experts`.
        sampled: keep some of the activations, too.

    Attributes:
        enabled: False while a pass is not to be counted.
        draws: a random number for each token of the batch `[T]`, for the sample.
        routed: tokens that the router sent to each expert.
        topped_up: index of an expert -> tokens of others that it was given.
    """

    def __init__(self, module: nn.Module, sampled: bool = False) -> None:
        self.module: Any = module
        self.sampled = sampled
        self.enabled = True
        shapes = expert_weights(module)
        self.first, self.second = shapes
        experts, _, self.least = shapes[self.first]
        self.draws: Tensor | None = None
        self.routed = [0] * experts
        self.topped_up: dict[int, int] = {}
        device = next(module.parameters()).device
        self._moments = {
            base: [SecondMoment(columns, device) for _ in range(experts)]
            for base, (_, _, columns) in shapes.items()
        }
        self._samples = {base: [RowSample(_SAMPLE) for _ in range(experts)] for base in shapes}
        self._spare: list[Tensor] = []

    def __enter__(self) -> ExpertsCapture:
        self._handle = self.module.register_forward_pre_hook(self._hook())
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _hook(self) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.enabled:
                self._read(args[0].detach(), args[1])

        return hook

    def _read(self, hidden: Tensor, chosen: Tensor) -> None:
        """Add tokens `[T, H]` that were sent to experts `[T, top_k]`."""
        draws = drawn_for(hidden, self.draws)
        for expert in range(len(self.routed)):
            rows = (chosen == expert).any(-1).nonzero()[:, 0]
            if len(rows):
                self.routed[expert] += len(rows)
                self._add(expert, hidden[rows], None if draws is None else draws[rows.cpu()])
        kept = sum(map(len, self._spare))
        if kept < self.least:
            self._spare.append(hidden[: self.least - kept].clone())

    def _add(self, expert: int, x: Tensor, draws: Tensor | None = None) -> None:
        for base, read in ((self.first, x), (self.second, self._inner(expert, x))):
            self._moments[base][expert].add(read, read)
            if self.sampled:
                self._samples[base][expert].add(read, draws)

    def _inner(self, expert: int, x: Tensor) -> Tensor:
        """What the second stack reads, `[T, I]`."""
        weight = getattr(self.module, self.first)[expert]
        bias = getattr(self.module, f"{self.first}_bias")[expert] if self.module.has_bias else None
        y = nn.functional.linear(x, weight.T if self.module.is_transposed else weight, bias)
        inner: Tensor = (
            self.module._apply_gate(y) if self.module.has_gate else self.module.act_fn(y)
        )
        return inner

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other processes have seen; all of them come here."""
        if ranks.size == 1:
            return
        device = next(self.module.parameters()).device
        seen = ranks.gather((self.routed, [tokens.cpu() for tokens in self._spare]))
        self.routed = [sum(counts) for counts in zip(*(routed for routed, _ in seen), strict=True)]
        spare = [tokens for _, kept in seen for tokens in kept]
        # Shares are neighbours: the first tokens of all are the first ones of the whole.
        self._spare = [torch.cat(spare)[: self.least].to(device)] if spare else []
        for moments in self._moments.values():
            for moment in moments:
                ranks.sum_(moment.total)
        for sample in (each for samples in self._samples.values() for each in samples):
            sample.sum_over(ranks, device)

    @torch.no_grad()
    def statistics(self) -> dict[str, list[InputStatistics] | None]:
        """By stack, one for each expert; None where the module never ran."""
        if not self._spare:
            return dict.fromkeys(self._moments)
        spare = torch.cat(self._spare)
        for expert, seen in enumerate(self.routed):
            missing = min(self.least - seen, len(spare))
            if missing > 0:
                self.topped_up[expert] = missing
                self._add(expert, spare[:missing])
        tokens = [seen + self.topped_up.get(expert, 0) for expert, seen in enumerate(self.routed)]
        return {
            base: [
                InputStatistics(
                    tokens=count,
                    hessian=moment.mean(count),
                    largest=sample.largest(),
                    sample=sample.rows(),
                )
                for moment, sample, count in zip(moments, self._samples[base], tokens, strict=True)
            ]
            for base, moments in self._moments.items()
        }
