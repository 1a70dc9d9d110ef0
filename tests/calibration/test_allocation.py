"""The shares of a budget: the optimum of every combination, whatever sizes and costs are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from hfq import ConfigError
from hfq.calibration import allocation as module
from hfq.calibration.allocation import Allocation, Group, allocate


def group(sizes: Sequence[int], costs: Sequence[float], name: str = "w") -> Group:
    bits = range(2, 2 + len(sizes))
    return Group(
        names=(name,),
        weights=8,
        bytes=dict(zip(bits, sizes, strict=True)),
        costs=dict(zip(bits, costs, strict=True)),
    )


def random_groups(count: int, multiple: int, generator: torch.Generator) -> list[Group]:
    sizes = torch.randint(1, 40, (count, 3), generator=generator).sort(1).values * multiple
    costs = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    return [group(s, c) for s, c in zip(sizes.tolist(), costs.tolist(), strict=True)]


def total(groups: Sequence[Group], bits: Sequence[int]) -> tuple[int, float]:
    pairs = list(zip(groups, bits, strict=True))
    return sum(g.bytes[b] for g, b in pairs), sum(g.costs[b] for g, b in pairs)


@pytest.mark.parametrize("multiple", [1, 7, 4096])
def test_no_combination_is_better(multiple: int, generator: torch.Generator) -> None:
    for _ in range(30):
        groups = random_groups(5, multiple, generator)
        least = sum(min(g.bytes.values()) for g in groups)
        most = sum(max(g.bytes.values()) for g in groups)
        budget = int(torch.randint(least, most + 2, (), generator=generator))
        size, cost = total(groups, allocate(groups, budget))
        every = (total(groups, bits) for bits in itertools.product(*(g.costs for g in groups)))
        assert size <= budget
        assert math.isclose(cost, min(c for s, c in every if s <= budget))


def test_sizes_without_a_common_divisor_keep_the_budget(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNITS", 50)
    groups = random_groups(20, 1, generator)
    budget = 20 * 20
    size, cost = total(groups, allocate(groups, budget))
    monkeypatch.undo()
    exact_size, exact_cost = total(groups, allocate(groups, budget))
    assert size <= budget and exact_size <= budget
    assert exact_cost <= cost < 1.5 * exact_cost


def test_ends_of_the_range() -> None:
    groups = [group((2, 3, 4), (3.0, 2.0, 1.0)), group((5, 7, 9), (3.0, 2.0, 1.0))]
    assert allocate(groups, 7) == [2, 2]
    assert allocate(groups, 10**12) == [4, 4]
    assert allocate([], 0) == []
    with pytest.raises(ConfigError, match=r"leaves 6 bytes .* at least 7: raise target_bits"):
        allocate(groups, 6)


def test_more_bits_that_gain_nothing_are_not_spent() -> None:
    assert allocate([group((2, 3, 4), (1.0, 1.0, 1.0))], 10) == [2]


def test_the_table_tells_blocks_apart() -> None:
    groups = tuple(
        group((2, 3), (2e-3, 1e-3), f"layers.{block}.{kind}")
        for block in range(3)
        for kind in ("a", "b")
    )
    found = Allocation(target_bits=2.5, bits_per_weight=2.4, groups=groups, bits=(2, 3, 2, 3, 3, 3))
    assert found.by_name["layers.2.a"] == 3 and found.by_name["layers.1.a"] == 2
    assert found.predicted_kl == pytest.approx(8e-3)
    table = found.table()
    assert "2 2 3" in table and "3 3 3" in table and "2.400 bits per weight (target 2.5)" in table
    assert found.to_dict()["predicted_kl"] == found.predicted_kl
