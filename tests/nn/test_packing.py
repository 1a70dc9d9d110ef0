"""From a float weight to packed tensors: every float dtype, any slices, stacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.errors import WeightError
from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.core.weight import QuantizedWeight
from hfq.formats import FORMATS
from hfq.nn import packing
from hfq.nn.slot import PackedSlot

MakeWeight = Callable[..., Tensor]

STORED: list[tuple[str, QuantSpec]] = [
    ("int", IntSpec(group_size=8)),
    ("int", IntSpec(bits=3, group_size=8, sym=False)),
    ("nf4", CodebookSpec(group_size=8, double_quant=True)),
]


def slot_of(format_name: str, spec: QuantSpec, *shape: int) -> PackedSlot:
    *stack, rows, columns = shape
    return PackedSlot(
        base="weight",
        format=format_name,
        spec=spec,
        out_features=rows,
        in_features=columns,
        experts=stack[0] if stack else None,
    )


def rounding(spec: QuantSpec) -> packing.Encode:
    def encode(rows: Tensor) -> QuantizedWeight:
        assert rows.dtype == torch.float32
        return affine.encode(rows, *affine.range_grid(rows, spec), spec)

    return encode


def dequantized(tensors: dict[str, Tensor], slot: PackedSlot) -> Tensor:
    return FORMATS.get(slot.format).unpack(tensors, slot.spec, slot.in_features).dequantize()


@pytest.mark.parametrize(("format_name", "spec"), STORED)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_every_float_dtype(
    format_name: str, spec: QuantSpec, dtype: torch.dtype, random_weight: MakeWeight
) -> None:
    weight = random_weight(12, 37).to(dtype)
    before = weight.clone()
    slot = slot_of(format_name, spec, 12, 37)
    tensors = packing.pack_weight(weight, slot, rounding(spec))
    expected = affine.encode(
        weight.float(), *affine.range_grid(weight.float(), spec), spec
    ).dequantize()
    assert torch.equal(dequantized(tensors, slot), expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("format_name", "spec"), STORED)
def test_slices_do_not_show(
    format_name: str,
    spec: QuantSpec,
    random_weight: MakeWeight,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(2 * packing.ROW_CHUNK + 3, 20)
    slot = slot_of(format_name, spec, *weight.shape)
    whole = packing.pack_weight(weight, slot, rounding(spec))
    seen: list[int] = []

    def encode(rows: Tensor) -> QuantizedWeight:
        seen.append(rows.shape[0])
        return rounding(spec)(rows)

    monkeypatch.setattr(packing, "_SLICE", 1)
    pieces = packing.pack_weight(weight, slot, encode)
    assert seen == [packing.ROW_CHUNK, packing.ROW_CHUNK, 3]
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[key], whole[key]) for key in whole)


@pytest.mark.parametrize(("format_name", "spec"), STORED)
def test_a_stack_is_packed_one_by_one(
    format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    weights = [random_weight(12, 20) for _ in range(3)]
    slot, one = slot_of(format_name, spec, 3, 12, 20), slot_of(format_name, spec, 12, 20)
    stack = packing.pack_weight(torch.stack(weights), slot, rounding(spec))
    for index, weight in enumerate(weights):
        single = packing.pack_weight(weight, one, rounding(spec))
        assert all(torch.equal(stack[key][index], single[key]) for key in single)


def test_strides_and_gradients_do_not_matter(random_weight: MakeWeight) -> None:
    spec = IntSpec(group_size=8)
    weight = random_weight(20, 12).T.requires_grad_()
    slot = slot_of("int", spec, 12, 20)
    strided = packing.pack_weight(weight, slot, rounding(spec))
    plain = packing.pack_weight(weight.detach().contiguous(), slot, rounding(spec))
    assert all(torch.equal(strided[key], plain[key]) for key in plain)
    assert not any(tensor.requires_grad for tensor in strided.values())


@pytest.mark.parametrize("shape", [(0, 20), (1, 1)])
def test_the_smallest_weights(shape: tuple[int, int], random_weight: MakeWeight) -> None:
    spec = IntSpec(group_size=8)
    slot = slot_of("int", spec, *shape)
    tensors = packing.pack_weight(random_weight(*shape), slot, rounding(spec))
    assert dequantized(tensors, slot).shape == shape


def test_a_wrong_shape_is_refused(random_weight: MakeWeight) -> None:
    spec = IntSpec(group_size=8)
    with pytest.raises(WeightError, match=r"expected a weight of shape \(12, 20\), got \(20, 12\)"):
        packing.pack_weight(random_weight(20, 12), slot_of("int", spec, 12, 20), rounding(spec))


def test_a_float64_weight_that_float32_cannot_hold_is_refused(random_weight: MakeWeight) -> None:
    spec = IntSpec(group_size=8)
    weight = random_weight(12, 20).double()
    weight[3, 4] = 1e300
    with pytest.raises(WeightError, match="expected finite weights"):
        packing.pack_weight(weight, slot_of("int", spec, 12, 20), rounding(spec))
