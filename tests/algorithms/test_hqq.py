"""Method ``hqq``: zero points with a smaller error, never with a larger one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hfq.algorithms.hqq as module
from hfq.algorithms import ALGORITHMS
from hfq.algorithms.hqq import NORM
from hfq.core.errors import ConfigError
from hfq.core.spec import CodebookSpec, Int8Spec, IntSpec, QuantSpec
from hfq.core.weight import QuantizedWeight, expand_groups

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]

SPECS = [
    IntSpec(bits=bits, group_size=group_size, sym=False, scale_dtype=scale_dtype)
    for bits in (2, 3, 4, 8)
    for group_size, scale_dtype in ((16, "float16"), (-1, "bfloat16"), (16, "float32"))
]


def hqq(weight: Tensor, spec: QuantSpec, iterations: int = 20) -> QuantizedWeight:
    return ALGORITHMS.get("hqq").quantize(weight, spec, {"iterations": iterations})


def rtn(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    return ALGORITHMS.get("rtn").quantize(weight, spec, {"scale_search": False})


def norm(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """What hqq minimises, of each group: mean of |error / scale|^p, float64 `[N, G]`."""
    size = quantized.spec.group_size
    scales = expand_groups(quantized.scales.double(), size, weight.shape[1])
    error = ((quantized.dequantize().double() - weight.double()) / scales).abs().pow(NORM)
    parts = [error] if size == -1 else error.split(size, dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_never_worse_than_rounding_in_any_group(
    spec: IntSpec, heavy_tailed_weight: MakeWeight
) -> None:
    weight = heavy_tailed_weight(20, 37)  # the last group has 5 columns of 16
    plain, optimised = norm(weight, rtn(weight, spec)), norm(weight, hqq(weight, spec))
    assert bool((optimised <= plain * (1 + 1e-3)).all()), (optimised / plain).max()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_falls_on_heavy_tails(bits: int, heavy_tailed_weight: MakeWeight) -> None:
    weight, spec = heavy_tailed_weight(64, 256), IntSpec(bits=bits, group_size=64, sym=False)
    plain, optimised = rtn(weight, spec), hqq(weight, spec)
    assert norm(weight, optimised).mean() < 0.98 * norm(weight, plain).mean()
    squared = [(q.dequantize() - weight).square().mean() for q in (optimised, plain)]
    assert squared[0] < 0.98 * squared[1]


def test_more_iterations_are_not_worse(heavy_tailed_weight: MakeWeight) -> None:
    weight, spec = heavy_tailed_weight(16, 64), IntSpec(bits=3, group_size=32, sym=False)
    errors = [norm(weight, hqq(weight, spec, n)).mean().item() for n in (1, 5, 20)]
    assert errors[2] <= errors[1] <= errors[0]


@pytest.mark.parametrize("exponent", [-20, 12])
def test_the_size_of_the_weights_does_not_matter(
    exponent: int, heavy_tailed_weight: MakeWeight
) -> None:
    spec = IntSpec(group_size=16, sym=False, scale_dtype="float32")
    weight = heavy_tailed_weight(8, 32)
    plain, scaled = hqq(weight, spec), hqq(weight * 2.0**exponent, spec)
    assert plain.zeros is not None and scaled.zeros is not None
    assert torch.equal(scaled.codes, plain.codes) and torch.equal(scaled.zeros, plain.zeros)
    assert torch.equal(scaled.scales, plain.scales * 2.0**exponent)


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_slices_do_not_show(
    spec: QuantSpec, random_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(13, 40)
    whole = hqq(weight, spec)
    monkeypatch.setattr(module, "_SLICE", 3 * 40)
    assert torch.equal(hqq(weight, spec).dequantize(), whole.dequantize())


def test_zero_points_are_fractional(random_weight: MakeWeight) -> None:
    zeros = hqq(random_weight(16, 64), IntSpec(group_size=32, sym=False)).zeros
    assert zeros is not None and bool((zeros != zeros.round()).any())


@pytest.mark.parametrize("spec", [IntSpec(), Int8Spec(), CodebookSpec()])
def test_a_grid_without_zero_points_is_refused(spec: QuantSpec) -> None:
    with pytest.raises(
        ConfigError, match=r"needs format 'int' with sym=False, got .* scale_search"
    ):
        ALGORITHMS.get("hqq").check(spec, {"iterations": 20})


@pytest.mark.parametrize("iterations", [0, -1, 1.5, "20", None, True])
def test_iterations_are_a_positive_number(iterations: object) -> None:
    with pytest.raises(ConfigError, match="iterations must be a positive integer, got"):
        ALGORITHMS.get("hqq").check(IntSpec(sym=False), {"iterations": iterations})
