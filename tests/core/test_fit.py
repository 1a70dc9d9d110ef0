"""The search for the grid with the least squared error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.fit import fit_grid
from hfq.core.spec import CodebookSpec, Int8Spec, IntSpec, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

MakeWeight = Callable[..., Tensor]

SPECS: list[QuantSpec] = [
    *(IntSpec(bits=bits, group_size=16, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    IntSpec(group_size=-1, scale_dtype="bfloat16", sym=False),
    CodebookSpec(group_size=16),
    CodebookSpec(codebook="fp4", group_size=16, scale_dtype="float32"),
    Int8Spec(),
]


def cost(
    weight: Tensor, grid: tuple[Tensor, Tensor | None], spec: QuantSpec, importance: Tensor
) -> Tensor:
    """Weighted squared error of each group, float64 `[N, G]`."""
    error = affine.encode(weight, *grid, spec).dequantize().double() - weight.double()
    size = weight.shape[1] if spec.group_size == -1 else spec.group_size
    parts = (error.square() * importance.double()).split(size, dim=1)
    return torch.stack([part.sum(1) for part in parts], dim=1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.02, 30.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_never_worse_than_the_covering_grid(
    spec: QuantSpec,
    size: float,
    weighted: bool,
    heavy_tailed_weight: MakeWeight,
    generator: torch.Generator,
) -> None:
    weight = heavy_tailed_weight(20, 37, size=size)  # the last group has 5 columns of 16
    importance = torch.rand(37, generator=generator) if weighted else torch.ones(37)
    fitted = fit_grid(weight, spec, importance if weighted else None)
    plain = cost(weight, affine.range_grid(weight, spec), spec, importance)
    found = cost(weight, fitted, spec, importance)
    assert bool((found <= plain * (1 + 1e-4)).all()), (found / plain).max()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_gives_what_is_stored(spec: QuantSpec, heavy_tailed_weight: MakeWeight) -> None:
    scales, zeros = fit_grid(heavy_tailed_weight(4, 32), spec)
    assert torch.equal(scales, scales.to(spec.torch_scale_dtype).float())
    assert (zeros is None) == spec.sym
    if zeros is not None:
        assert torch.equal(zeros, zeros.to(spec.torch_scale_dtype).float())


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.75), (3, 0.8), (4, 0.85)])
def test_it_pays_on_heavy_tails(bits: int, gain: float, heavy_tailed_weight: MakeWeight) -> None:
    """On asymmetric grids more than the best of other zero points or other scales alone."""
    weight, spec = heavy_tailed_weight(64, 256), IntSpec(bits=bits, group_size=128, sym=False)
    every = torch.ones(256)
    plain = cost(weight, affine.range_grid(weight, spec), spec, every).sum()
    assert cost(weight, fit_grid(weight, spec), spec, every).sum() < gain * plain


def test_a_grid_that_fits_exactly_is_found(generator: torch.Generator) -> None:
    """A range that does not reach 0 needs a zero point outside of the codes."""
    spec = IntSpec(bits=3, group_size=32, sym=False, scale_dtype="float32")
    codes = torch.randint(8, (5, 64), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0.0, 7.0  # the whole range in every group
    weight = 3.0 + 0.25 * codes
    quantized = affine.encode(weight, *fit_grid(weight, spec), spec)
    torch.testing.assert_close(quantized.dequantize(), weight)


def test_columns_that_do_not_matter_are_sacrificed(random_weight: MakeWeight) -> None:
    spec, weight, importance = IntSpec(bits=2, group_size=16), random_weight(8, 16), torch.zeros(16)
    importance[3] = 1.0
    weight[:, 3] = 0.6 * weight.abs().amax(1)  # large enough for a code other than that of 0
    quantized = affine.encode(weight, *fit_grid(weight, spec, importance), spec)
    torch.testing.assert_close(quantized.dequantize()[:, 3], weight[:, 3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.37, -0.37])
def test_groups_of_one_value(spec: QuantSpec, value: float) -> None:
    weight = torch.full((3, 21), value)
    for importance in (None, torch.zeros(21)):
        quantized = affine.encode(weight, *fit_grid(weight, spec, importance), spec)
        torch.testing.assert_close(quantized.dequantize(), weight, rtol=1e-2, atol=0)


def test_importance_of_weights_goes_with_its_rows(
    heavy_tailed_weight: MakeWeight, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are searched in slices."""
    spec = IntSpec(bits=3, group_size=16, sym=False)
    weight, importance = heavy_tailed_weight(20, 48), torch.rand(20, 48, generator=generator)
    whole = fit_grid(weight, spec, importance)
    monkeypatch.setattr("hfq.core.fit._SLICE", 7 * 48)
    monkeypatch.setattr("hfq.core.fit._CACHED", 3 * 48)
    for one, other in zip(whole, fit_grid(weight, spec, importance), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other)
