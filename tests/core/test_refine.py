"""Turns of least squares grids and coordinate descent, against plain float64 sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.refine import refine
from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.core.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]

SPECS: list[QuantSpec] = [
    *(IntSpec(bits=bits, group_size=16, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    IntSpec(bits=3, group_size=-1, sym=False),
    IntSpec(bits=2, group_size=8, sym=False, scale_dtype="bfloat16"),
    CodebookSpec(group_size=32),
    CodebookSpec(group_size=16, double_quant=True),
]
COLUMNS = 150  # a block and a bit, a short last group


def moment(columns: int, generator: torch.Generator) -> Tensor:
    mixed = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixed
    hessian = inputs.T @ inputs / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian


def rounded(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    return affine.encode(weight, *affine.range_grid(weight, spec), spec)


def errors(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    difference = (weight - quantized.dequantize()).double()
    return (difference @ hessian.double() * difference).sum(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_row_gets_worse_and_most_get_better(
    spec: QuantSpec, random_weight: MakeWeight, generator: torch.Generator
) -> None:
    weight, hessian = random_weight(37, COLUMNS), moment(COLUMNS, generator)
    order = torch.randperm(COLUMNS, generator=generator)
    found = [rounded(weight, spec)]
    for turns in (1, 2):
        found.append(refine(weight, found[0], hessian, order, turns))
    first, second, third = (errors(weight, each, hessian) for each in found)
    assert bool((second <= first * 1.0001).all() and (third <= second * 1.0001).all())
    assert second.sum() < 0.95 * first.sum()
    assert found[2].scales.dtype == found[0].scales.dtype
    assert found[2].codes.dtype == torch.uint8 and int(found[2].codes.max()) < spec.levels


@pytest.mark.parametrize("sym", [True, False])
def test_the_grid_is_the_least_squares_one(
    sym: bool, random_weight: MakeWeight, generator: torch.Generator
) -> None:
    """After enough turns the codes stand still, and the derivative by each scale and zero point is 0."""
    spec = IntSpec(bits=3, group_size=16, sym=sym, scale_dtype="float32")
    weight, hessian = random_weight(5, 64), moment(64, generator)
    done = refine(weight, rounded(weight, spec), hessian, torch.arange(64), 30)
    pull = (weight - done.dequantize()) @ hessian
    zero = spec.implied_zero if done.zeros is None else done.zeros.repeat_interleave(16, 1)
    points = done.codes.float() - zero
    size = (weight @ hessian * points).unflatten(1, (-1, 16)).sum(-1).abs().mean()
    assert (pull * points).unflatten(1, (-1, 16)).sum(-1).abs().max() < 1e-3 * size
    if not sym:
        assert pull.unflatten(1, (-1, 16)).sum(-1).abs().max() < 1e-3 * size


def test_the_codes_are_the_best_one_by_one(
    random_weight: MakeWeight, generator: torch.Generator
) -> None:
    spec = IntSpec(bits=2, group_size=16)
    weight, hessian = random_weight(4, 32), moment(32, generator)
    done = refine(weight, rounded(weight, spec), hessian, torch.arange(32), 50)
    least = errors(weight, done, hessian)
    for column in range(32):
        for code in range(spec.levels):
            codes = done.codes.clone()
            codes[:, column] = code
            changed = QuantizedWeight(spec=spec, codes=codes, scales=done.scales)
            assert bool((errors(weight, changed, hessian) >= least * (1 - 1e-5)).all())


def test_without_errors_nothing_changes(
    random_weight: MakeWeight, generator: torch.Generator
) -> None:
    spec, hessian = IntSpec(bits=4, group_size=16, sym=False), moment(48, generator)
    known = rounded(random_weight(6, 48), spec)
    again = refine(known.dequantize(), known, hessian, torch.arange(48), 2)
    assert torch.equal(again.codes, known.codes)
    assert torch.equal(again.scales, known.scales)


def test_groups_of_zeros_stay_zero(random_weight: MakeWeight, generator: torch.Generator) -> None:
    weight, hessian = random_weight(6, 48), moment(48, generator)
    weight[:, 16:32] = 0
    for sym in (True, False):
        known = rounded(weight, IntSpec(bits=3, group_size=16, sym=sym))
        done = refine(weight, known, hessian, torch.arange(48), 2)
        assert bool(done.dequantize().isfinite().all())
        assert bool((errors(weight, done, hessian) <= errors(weight, known, hessian)).all())
