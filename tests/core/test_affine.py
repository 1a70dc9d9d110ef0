"""Rounding to a grid: nearest, inside known bounds, at every size of weights, and never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.codebooks import codebook
from hfq.core.errors import ConfigError, WeightError
from hfq.core.spec import SCALE_BLOCK, CodebookSpec, Int8Spec, IntSpec, QuantSpec
from hfq.core.weight import QuantizedWeight, ScaleCodes, expand_groups

INT_SPECS = [
    IntSpec(bits=bits, group_size=group_size, sym=sym, scale_dtype=scale_dtype)
    for bits in range(2, 9)
    for group_size, scale_dtype in ((8, "float16"), (-1, "bfloat16"), (1, "float32"))
    for sym in (True, False)
]
CODEBOOK_SPECS = [
    CodebookSpec(codebook=name, group_size=group_size, scale_dtype=scale_dtype)
    for name in ("nf4", "fp4")
    for group_size, scale_dtype in ((8, "float16"), (-1, "bfloat16"), (1, "float32"))
]
SPECS: list[QuantSpec] = [*INT_SPECS, *CODEBOOK_SPECS, Int8Spec()]
SHAPES = [(3, 21), (1, 8), (5, 1), (2, 24), (0, 9)]

MakeWeight = Callable[..., Tensor]


def quantize(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    return affine.encode(weight, *affine.range_grid(weight, spec), spec)


def half_gap(spec: QuantSpec) -> float:
    """Largest distance to the nearest grid point, in scales, inside the grid's range."""
    if isinstance(spec, CodebookSpec):
        return codebook(spec.codebook).diff().max().item() / 2
    return 0.5


def per_column(values: Tensor, weight: QuantizedWeight) -> Tensor:
    return expand_groups(values.float(), weight.spec.group_size, weight.codes.shape[1])


# ---- groups


def test_a_short_last_group_repeats_its_last_column() -> None:
    weight = torch.arange(10.0).reshape(2, 5)
    groups = affine.group_columns(weight, 3)
    assert groups.tolist() == [[[0, 1, 2], [3, 4, 4]], [[5, 6, 7], [8, 9, 9]]]


@pytest.mark.parametrize("group_size", [-1, 5, 8])
def test_one_group_per_row(group_size: int) -> None:
    weight = torch.arange(10.0).reshape(2, 5)
    assert torch.equal(affine.group_columns(weight, group_size), weight.unsqueeze(1))


@pytest.mark.parametrize(("columns", "group_size"), [(12, 4), (13, 4), (15, 4), (3, 4), (7, -1)])
def test_group_mean_does_not_count_repeated_columns(
    columns: int, group_size: int, random_weight: MakeWeight
) -> None:
    weight = random_weight(3, columns)
    size = columns if group_size == -1 else group_size
    expected = torch.stack([part.mean(1) for part in weight.split(size, dim=1)], dim=1)
    mean = affine.group_mean(affine.group_columns(weight, group_size), columns)
    torch.testing.assert_close(mean, expected)


# ---- the grid


def test_a_symmetric_grid_puts_the_extreme_on_its_longer_side() -> None:
    weight = torch.tensor([[-8.0, 7.0], [-7.0, 8.0], [0.0, 0.0]])
    scales, zeros = affine.range_grid(weight, IntSpec())
    assert scales.flatten().tolist() == [1, -1, 0] and zeros is None
    quantized = quantize(weight, IntSpec())
    assert quantized.codes.tolist() == [[0, 15], [15, 0], [8, 8]]
    assert torch.equal(quantized.dequantize(), weight)


def test_an_asymmetric_grid_spans_the_range_and_zero() -> None:
    weight = torch.tensor([[-5.0, 10.0], [3.0, 15.0], [-15.0, -3.0], [0.0, 0.0]])
    scales, zeros = affine.range_grid(weight, IntSpec(sym=False))
    assert zeros is not None
    assert scales.flatten().tolist() == [1, 1, 1, 0]
    assert zeros.flatten().tolist() == [5, 0, 15, 0]
    assert torch.equal(quantize(weight, IntSpec(sym=False)).dequantize(), weight)


def test_a_codebook_is_scaled_by_the_largest_magnitude() -> None:
    weight = torch.tensor([[-3.0, 1.0], [0.5, 2.0]])
    scales, zeros = affine.range_grid(weight, CodebookSpec())
    assert scales.flatten().tolist() == [3, 2] and zeros is None


# ---- storing scales


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_are_stored_away_from_zero(dtype: str, generator: torch.Generator) -> None:
    spec = IntSpec(scale_dtype=dtype)
    exponents = torch.randint(-30, 15, (500, 1), generator=generator)
    scales = torch.randn(500, 1, generator=generator).ldexp(exponents)
    stored = affine.stored_scales(scales, spec)
    assert stored.dtype == spec.torch_scale_dtype
    assert bool((stored.float().abs() >= scales.abs()).all())
    assert torch.equal(stored.signbit(), scales.signbit())
    info = torch.finfo(stored.dtype)
    one_step = (scales.abs() * info.eps).clamp(min=info.tiny * info.eps)
    assert bool(((stored.float() - scales).abs() <= one_step).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_that_fit_stay(dtype: str, generator: torch.Generator) -> None:
    spec = IntSpec(scale_dtype=dtype)
    exact = torch.randn(100, 1, generator=generator).to(spec.torch_scale_dtype)
    exact[0], exact[1] = 0.0, -0.0
    stored = affine.stored_scales(exact.float(), spec)
    assert torch.equal(stored.view(torch.uint8), exact.view(torch.uint8))


def test_a_tiny_scale_becomes_the_smallest_one_not_zero() -> None:
    scales = torch.tensor([[1e-12], [-1e-12]])
    stored = affine.stored_scales(scales, IntSpec())
    assert stored.flatten().tolist() == [2**-24, -(2**-24)]


# ---- rounding


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1e-7, 1e-4, 0.02, 30.0])
def test_the_error_is_at_most_half_a_step(
    spec: QuantSpec, size: float, random_weight: MakeWeight
) -> None:
    for shape in SHAPES:
        weight = random_weight(*shape, size=size)
        quantized = quantize(weight, spec)
        low, high = grid_ends(quantized)
        bound = half_gap(spec) * per_column(quantized.scales, quantized).abs()
        inside = weight.clamp(low, high)
        error = (quantized.dequantize() - inside).abs()
        assert bool((error <= bound * (1 + 1e-4)).all()), (shape, (error / bound).max())
        # The shorter side of a symmetric integer grid may clip a whole step, an integer zero point half of one.
        clipped = 2 if isinstance(spec, IntSpec) and spec.sym else 1
        assert bool(((weight - inside).abs() <= clipped * bound * (1 + 1e-4)).all()), shape


def grid_ends(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The least and the largest value that each position could take, `[N, K]`."""
    ends = [
        replace(weight, codes=torch.full_like(weight.codes, code)).dequantize()
        for code in (0, weight.spec.levels - 1)
    ]
    return torch.minimum(*ends), torch.maximum(*ends)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_the_nearest(spec: QuantSpec, heavy_tailed_weight: MakeWeight) -> None:
    weight = heavy_tailed_weight(3, 21)
    quantized = quantize(weight, spec)
    assert quantized.codes.dtype == torch.uint8
    error = (quantized.dequantize() - weight).abs()
    scale = per_column(quantized.scales, quantized).abs()
    for code in range(spec.levels):
        other = replace(quantized, codes=torch.full_like(quantized.codes, code))
        # Ties may go either way by the rounding of the division.
        assert bool((error <= (other.dequantize() - weight).abs() + 1e-4 * scale).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_of_zeros_and_of_one_value(spec: QuantSpec) -> None:
    weight = torch.zeros(3, 21)
    weight[1], weight[2] = 0.37, -0.37
    dequantized = quantize(weight, spec).dequantize()
    assert torch.equal(dequantized[0], weight[0])
    torch.testing.assert_close(dequantized, weight, rtol=2**-7, atol=0)


# Asymmetric ranges move by up to half a step, and at 8 bits a bfloat16 scale may be a whole code too long.
STABLE = [spec for spec in SPECS if spec.sym and (spec.bits, spec.scale_dtype) != (8, "bfloat16")]


@pytest.mark.parametrize("spec", STABLE, ids=str)
def test_quantizing_twice_changes_nothing(spec: QuantSpec, random_weight: MakeWeight) -> None:
    """Merging an adapter quantizes what was quantized before."""
    once = quantize(random_weight(4, 21), spec)
    twice = quantize(once.dequantize(), spec)
    assert torch.equal(twice.dequantize(), once.dequantize())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_strides_do_not_matter(spec: QuantSpec, random_weight: MakeWeight) -> None:
    weight = random_weight(21, 5).T
    assert torch.equal(quantize(weight, spec).codes, quantize(weight.contiguous(), spec).codes)


def test_a_scale_without_reciprocal_counts_as_zero() -> None:
    weight = torch.full((1, 4), 1e-39)
    quantized = quantize(weight, IntSpec(scale_dtype="float32"))
    assert torch.equal(quantized.dequantize(), torch.zeros(1, 4))


# ---- refusals


@pytest.mark.parametrize("spec", [IntSpec(group_size=2), IntSpec(sym=False), CodebookSpec()])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_in_any_position(
    spec: QuantSpec, value: float, random_weight: MakeWeight
) -> None:
    for position in range(15):
        weight = random_weight(3, 5)
        weight.view(-1)[position] = value
        with pytest.raises(WeightError, match="expected finite weights, got NaN or infinity"):
            quantize(weight, spec)


def test_nan_is_found_whatever_the_scales(random_weight: MakeWeight) -> None:
    """An algorithm may choose scales that do not show it."""
    weight = random_weight(2, 4)
    weight[0, 0] = float("nan")
    with pytest.raises(WeightError):
        affine.encode(weight, torch.ones(2, 1), None, IntSpec())


@pytest.mark.parametrize("spec", [IntSpec(), CodebookSpec(), CodebookSpec(double_quant=True)])
def test_a_scale_too_large_for_float16(spec: QuantSpec, random_weight: MakeWeight) -> None:
    weight = random_weight(4, 64, size=1e6)
    with pytest.raises(
        ConfigError, match=r"a scale of .*e\+0\d does not fit scale_dtype='float16'"
    ):
        quantize(weight, spec)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_other_scale_dtypes_hold_large_weights(
    scale_dtype: str, size: float, random_weight: MakeWeight
) -> None:
    weight = random_weight(4, 64, size=size)
    for spec in (IntSpec(bits=8, scale_dtype=scale_dtype), CodebookSpec(scale_dtype=scale_dtype)):
        dequantized = quantize(weight, spec).dequantize()
        torch.testing.assert_close(dequantized, weight, atol=0.5 * size, rtol=0)


def test_the_largest_floats_fit_float32_scales() -> None:
    largest = torch.finfo(torch.float32).max / 2
    weight = torch.tensor([[-largest, largest]])
    quantized = quantize(weight, IntSpec(bits=8, sym=False, scale_dtype="float32"))
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=0.01, atol=0)


# ---- double quantization


def test_double_quantized_scales_are_within_half_a_step(random_weight: MakeWeight) -> None:
    weight = random_weight(67, 40)
    spec = CodebookSpec(group_size=8, double_quant=True)
    scales, _ = affine.range_grid(weight, spec)
    double = quantize(weight, spec)
    stored = double.scale_codes
    assert stored is not None
    assert stored.codes.shape == (67, 5) and stored.codes.dtype == torch.uint8
    assert stored.step.shape == stored.offset.shape == (-(-67 * 5 // SCALE_BLOCK),)
    step = stored.step.repeat_interleave(SCALE_BLOCK)[: 67 * 5].view(67, 5)
    rounding = double.scales.float() * 2**-11  # to float16
    difference = (double.scales.float() - scales).abs()
    assert bool((difference <= (step / 2 + rounding) * (1 + 1e-5)).all())


def test_double_quantized_scales_of_one_value() -> None:
    weight = torch.full((3, 8), 0.25)
    double = quantize(weight, CodebookSpec(group_size=8, double_quant=True))
    assert torch.equal(double.dequantize(), weight)


def test_scales_of_a_stack_are_decoded_one_by_one(generator: torch.Generator) -> None:
    codes = torch.randint(0, 256, (3, 20, 30), generator=generator, dtype=torch.uint8)
    step = torch.rand(3, 3, generator=generator)
    offset = torch.rand(3, 3, generator=generator)
    stack = affine.decode_scales(ScaleCodes(codes=codes, step=step, offset=offset), torch.float32)
    for index in range(3):
        one = ScaleCodes(codes=codes[index], step=step[index], offset=offset[index])
        assert torch.equal(stack[index], affine.decode_scales(one, torch.float32))


def test_decoded_scales_follow_the_formula(generator: torch.Generator) -> None:
    codes = torch.randint(0, 256, (26, 10), generator=generator, dtype=torch.uint8)
    step, offset = torch.rand(2, 2, generator=generator)
    decoded = affine.decode_scales(ScaleCodes(codes=codes, step=step, offset=offset), torch.float32)
    for position in (0, 255, 256, 259):
        block = position // 256
        expected = offset[block] + codes.flatten()[position] * step[block]
        assert decoded.flatten()[position] == expected
