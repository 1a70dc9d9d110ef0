"""What every method promises; runs for each registered method, format and spec that go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from hfq.algorithms import ALGORITHMS
from hfq.core.errors import WeightError
from hfq.core.spec import QuantSpec, SpqrSpec, group_count
from hfq.core.statistics import InputStatistics
from hfq.core.weight import QuantizedWeight
from hfq.nn import packing
from hfq.nn.slot import PackedSlot

pytestmark = [pytest.mark.every_recipe, pytest.mark.usefixtures("one_thread")]

SHAPES = [(3, 21), (1, 1), (5, 8), (0, 7)]

MakeWeight = Callable[..., Tensor]
Options = Mapping[str, object]


def same_bytes(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def quantize(weight: Tensor, method: str, options: Options, spec: QuantSpec) -> QuantizedWeight:
    """With statistics of made-up inputs where the method needs them."""
    algorithm, statistics = ALGORITHMS.get(method), None
    if algorithm.calibrated:
        columns = weight.shape[1]
        inputs = torch.randn(50, columns, generator=torch.Generator().manual_seed(columns))
        statistics = InputStatistics(tokens=50, hessian=inputs.T @ inputs / 50)
    return algorithm.quantize(weight, spec, options, statistics)


def packed(weight: Tensor, slot: PackedSlot, method: str, options: Options) -> dict[str, Tensor]:
    def encode(rows: Tensor) -> QuantizedWeight:
        return quantize(rows, method, options, slot.spec)

    return packing.pack_weight(weight, slot, encode)


def slot_of(weight: Tensor, format_name: str, spec: QuantSpec) -> PackedSlot:
    rows, columns = weight.shape
    return PackedSlot(
        base="weight", format=format_name, spec=spec, out_features=rows, in_features=columns
    )


def test_the_result_fits_the_spec(
    method: str, options: Options, format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    for rows, columns in SHAPES:
        weight = random_weight(rows, columns)
        before = weight.clone()
        result = quantize(weight, method, options, spec)
        groups = (rows, group_count(columns, spec.group_size))
        assert torch.equal(weight, before)
        assert result.spec == spec
        assert result.codes.shape == (rows, columns) and result.codes.dtype == torch.uint8
        assert bool((result.codes.int() < spec.levels).all())
        assert result.scales.shape == groups and result.scales.dtype == spec.torch_scale_dtype
        assert (result.zeros is None) == spec.sym
        if result.zeros is not None:
            assert result.zeros.shape == groups and result.zeros.dtype == spec.torch_scale_dtype
        assert bool(result.dequantize().isfinite().all())


def test_rows_are_independent(
    method: str, options: Options, format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    """So a weight may be quantized in pieces of `ROW_CHUNK` rows, and again with the same result."""
    if ALGORITHMS.get(method).calibrated:
        pytest.skip("products of other sizes round otherwise; calibrated weights are never cut")
    weight = random_weight(2 * packing.ROW_CHUNK + 3, 7)
    slot = slot_of(weight, format_name, spec)
    whole = packed(weight, slot, method, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_SLICE", 1)
        assert same_bytes(packed(weight, slot, method, options), whole)


def test_groups_of_zeros_stay_zero(
    method: str, options: Options, format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    weight = random_weight(3, 20)
    weight[0], weight[1, 5:10] = 0, 0
    result = quantize(weight, method, options, spec).dequantize()
    if isinstance(spec, SpqrSpec):
        # Steps and offsets are shared with other rows: scales come near 0, zero points near a code.
        assert result[0].abs().max() < 0.05 * weight.abs().max()
        return
    assert torch.equal(result[0], weight[0])
    if (
        spec.group_size == 5 and not ALGORITHMS.get(method).calibrated
    ):  # others make good for errors
        assert torch.equal(result[1, 5:10], weight[1, 5:10])


def test_a_group_of_one_value_keeps_it(
    method: str, options: Options, format_name: str, spec: QuantSpec
) -> None:
    weight = torch.tensor([[0.37], [-0.37], [0.001]]).expand(3, 9).contiguous()
    result = quantize(weight, method, options, spec).dequantize()
    # Of bilevel grids errors are small beside those of the largest row that shares their steps.
    atol = 0.004 if isinstance(spec, SpqrSpec) else 0
    torch.testing.assert_close(result, weight, rtol=0.01, atol=atol)


def test_nan_and_infinity_are_refused(
    method: str, options: Options, format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    for position, value in ((0, "nan"), (10, "inf"), (20, "-inf")):
        weight = random_weight(3, 7)
        weight.view(-1)[position] = float(value)
        with pytest.raises(WeightError, match="expected finite weights, got NaN or infinity"):
            quantize(weight, method, options, spec)
