"""Method ``rtn``: rounding to nearest, and the search for a better scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.algorithms import ALGORITHMS
from hfq.core import affine
from hfq.core.errors import ConfigError
from hfq.core.spec import CodebookSpec, Int8Spec, IntSpec, QuantSpec
from hfq.core.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]

SPECS: list[QuantSpec] = [
    *(IntSpec(bits=bits, group_size=16, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    IntSpec(group_size=-1, scale_dtype="bfloat16"),
    CodebookSpec(group_size=16),
    CodebookSpec(codebook="fp4", group_size=16, scale_dtype="float32"),
    Int8Spec(),
]


def quantize(weight: Tensor, spec: QuantSpec, scale_search: bool) -> QuantizedWeight:
    return ALGORITHMS.get("rtn").quantize(weight, spec, {"scale_search": scale_search})


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Of each group, float64 `[N, G]`."""
    error = (quantized.dequantize().double() - weight.double()).square()
    size = quantized.spec.group_size
    parts = [error] if size == -1 else error.split(size, dim=1)
    return torch.stack([part.sum(1) for part in parts], dim=1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_search_it_rounds_to_the_covering_grid(
    spec: QuantSpec, random_weight: MakeWeight
) -> None:
    weight = random_weight(5, 37)
    expected = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    assert torch.equal(quantize(weight, spec, False).dequantize(), expected.dequantize())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.02])
def test_the_search_is_never_worse_in_any_group(
    spec: QuantSpec, size: float, heavy_tailed_weight: MakeWeight
) -> None:
    weight = heavy_tailed_weight(20, 37, size=size)  # the last group has 5 columns of 16
    plain = squared_error(weight, quantize(weight, spec, False))
    searched = squared_error(weight, quantize(weight, spec, True))
    assert bool((searched <= plain * (1 + 1e-4)).all()), (searched / plain).max()


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.75), (3, 0.85), (4, 0.95)])
def test_the_search_pays_on_heavy_tails(
    bits: int, gain: float, heavy_tailed_weight: MakeWeight
) -> None:
    weight, spec = heavy_tailed_weight(64, 256), IntSpec(bits=bits, group_size=128)
    plain = squared_error(weight, quantize(weight, spec, False)).sum()
    searched = squared_error(weight, quantize(weight, spec, True)).sum()
    assert searched < gain * plain


def test_the_search_finds_the_grid_that_is_there() -> None:
    """All weights but one are whole numbers; 0.8 of the scale that covers the one gives steps of 1."""
    weight, spec = torch.arange(-7.0, 8.0).repeat(100).unsqueeze(0), IntSpec(group_size=-1)
    weight[0, 0] = 10.0
    assert squared_error(weight, quantize(weight, spec, False)).item() > 5
    searched = quantize(weight, spec, True)
    assert searched.scales.item() == pytest.approx(-1, abs=2e-3)
    assert squared_error(weight, searched).item() <= 4  # at -1 exactly: 10 is stored as 8


@pytest.mark.parametrize("value", [1, "yes", None])
def test_scale_search_is_a_flag(value: object) -> None:
    with pytest.raises(ConfigError, match="scale_search must be True or False, got"):
        ALGORITHMS.get("rtn").check(IntSpec(), {"scale_search": value})
