"""Which weight gets how many bits: the least predicted loss that fits into a budget of bytes.

Every group of weights takes one of its options, each with a size and a cost. Costs of groups add up (their errors are
small and hardly depend on each other), so this is the multiple-choice knapsack problem, solved exactly by dynamic
programming over the bytes that are spent:

    least[g][s] = min over options o of group g of  least[g - 1][s - size(o)] + cost(o)

Sizes are counted from the smallest option of each group in units of their greatest common divisor. In models whose sizes
have nothing in common the unit is as large as `_UNITS` asks for, and sizes are rounded up: the budget still holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core.errors import ConfigError
from ..table import format_table, without_numbers

__all__ = ["Allocation", "Group", "allocate"]

# Steps that a budget is cut into where sizes have no larger common divisor; 0.2 % are lost with 128 groups then.
_UNITS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that get the same bits, because they read the same activations, or one stack of experts.

    Attributes:
        names: full names of the weights.
        weights: how many numbers.
        bytes: bits -> of all of them, scales and zero points included.
        costs: bits -> predicted KL divergence from the float model if nothing else is quantized, nats per token.
    """

    names: tuple[str, ...]
    weights: int
    bytes: Mapping[int, int]
    costs: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What `target_bits` came to.

    Attributes:
        target_bits: that were asked for, on average over all quantized weights.
        bits_per_weight: that are stored, scales and zero points included; at most `target_bits`.
        groups: in the order of the model.
        bits: of each group.
        fixed_weights: that got no say, because overrides name their bits, or because they stand outside of the blocks.
    """

    target_bits: float
    bits_per_weight: float
    groups: tuple[Group, ...]
    bits: tuple[int, ...]
    fixed_weights: int = 0

    @property
    def by_name(self) -> dict[str, int]:
        """Full name of each weight -> its bits."""
        return {
            name: bits
            for group, bits in zip(self.groups, self.bits, strict=True)
            for name in group.names
        }

    @property
    def predicted_kl(self) -> float:
        """Sum of the costs: nats per token, without the weights that are fixed."""
        pairs = zip(self.groups, self.bits, strict=True)
        return sum(group.costs[bits] for group, bits in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; keys of costs and bytes become strings there."""
        return {**asdict(self), "predicted_kl": self.predicted_kl}

    def table(self) -> str:
        """A row for each kind of weight: its bits by block, and what it costs at each choice."""
        kinds: dict[str, list[tuple[Group, int]]] = {}
        for group, bits in zip(self.groups, self.bits, strict=True):
            kinds.setdefault(_kind(group), []).append((group, bits))
        candidates = sorted({bits for group in self.groups for bits in group.costs})
        rows = [
            [
                kind,
                *(f"{sum(g.costs[bits] for g, _ in found):.1e}" for bits in candidates),
                " ".join(str(bits) for _, bits in found),
            ]
            for kind, found in kinds.items()
        ]
        header = ["weights", *(f"KL at {bits}" for bits in candidates), "bits, block by block"]
        line = f"{self.bits_per_weight:.3f} bits per weight (target {self.target_bits:g})"
        line += f", predicted KL {self.predicted_kl:.5f} nats per token"
        return f"{format_table(header, rows)}\n{line}"


def allocate(groups: Sequence[Group], budget: int) -> list[int]:
    """The bits of each group with the least sum of costs within `budget` bytes; deterministic.

    Raises:
        ConfigError: even the smallest options do not fit.
    """
    smallest = [min(group.bytes.values()) for group in groups]
    spare = budget - sum(smallest)
    if spare < 0:
        raise ConfigError(
            f"target_bits leaves {budget} bytes for the weights that it is to choose bits for, but they take at least "
            f"{sum(smallest)}: raise target_bits, allow fewer candidate_bits, or lower the bits of overrides"
        )
    extra = [
        {bits: size - least for bits, size in group.bytes.items()}
        for group, least in zip(groups, smallest, strict=True)
    ]
    # More than the largest options together can never be spent.
    spare = min(spare, sum(max(each.values()) for each in extra))
    unit = math.gcd(*(size for each in extra for size in each.values())) or 1
    unit = max(unit, -(-spare // _UNITS))
    steps = [{bits: -(-size // unit) for bits, size in each.items()} for each in extra]
    return _least([group.costs for group in groups], steps, spare // unit)


def _least(
    costs: Sequence[Mapping[int, float]], steps: Sequence[Mapping[int, int]], budget: int
) -> list[int]:
    """The dynamic program of the module's docstring; of equal sums the one with fewer bits."""
    least = torch.zeros(budget + 1, dtype=torch.float64)
    chosen = []
    for group_costs, group_steps in zip(costs, steps, strict=True):
        best = torch.full_like(least, torch.inf)
        picked = torch.zeros(budget + 1, dtype=torch.uint8)
        for bits in sorted(group_costs):
            step = group_steps[bits]
            if step <= budget:
                sums = least[: budget + 1 - step] + group_costs[bits]
                better = sums < best[step:]
                best[step:][better], picked[step:][better] = sums[better], bits
        least = best
        chosen.append(picked)
    found, left = [], budget
    for picked, group_steps in zip(reversed(chosen), reversed(steps), strict=True):
        found.append(int(picked[left]))
        left -= group_steps[found[-1]]
    return found[::-1]


def _kind(group: Group) -> str:
    """Names without the numbers of layers, and what they have in common said once: ``layers.*.mlp.gate_proj, up_proj``."""
    first, *others = (without_numbers(name) for name in group.names)
    place = first.rpartition(".")[0]
    return ", ".join([first, *(name.removeprefix(f"{place}.") for name in others)])
