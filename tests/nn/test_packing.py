"""From a float weight to packed tensors: every float dtype, any slices, stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfq.core import affine
from hfq.core.errors import WeightError
from hfq.core.spec import CodebookSpec, Fp8Spec, Int8Spec, IntSpec, QuantSpec
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


def test_kernels_of_our_own_get_larger_slices(
    random_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype of the weight, which they read."""
    weight = random_weight(3 * packing.ROW_CHUNK, 20).bfloat16()
    slot = slot_of("int", IntSpec(group_size=8), *weight.shape)
    seen: list[tuple[int, torch.dtype]] = []

    def encode(rows: Tensor) -> QuantizedWeight:
        seen.append((rows.shape[0], rows.dtype))
        return rounding(slot.spec)(rows.float())

    monkeypatch.setattr(packing, "_SLICE", 1)
    monkeypatch.setattr(packing, "_SLICE_NATIVE", 2 * packing.ROW_CHUNK * 20)
    monkeypatch.setattr(packing.cuda_packing_ops, "takes", lambda weight: True)
    packing.pack_weight(weight, slot, encode)
    assert seen == [(rows * packing.ROW_CHUNK, torch.bfloat16) for rows in (2, 1)]


class _Operators(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("format_name", "spec"),
    [
        *STORED,
        ("int", IntSpec(bits=4, group_size=8, sym=False)),
        ("int8", Int8Spec(activation="dynamic")),
        ("fp8", Fp8Spec()),
        ("nf4", CodebookSpec(group_size=8)),
    ],
)
def test_a_slice_asks_the_device_twice(
    format_name: str, spec: QuantSpec, random_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each answer is waited for. The weights are finite, the scales are; nothing else is asked."""
    weight = random_weight(3 * packing.ROW_CHUNK, 40).bfloat16()
    slot = slot_of(format_name, spec, *weight.shape)
    asked: list[Tensor] = []
    is_finite = affine._is_finite
    monkeypatch.setattr(
        affine, "_is_finite", lambda values: bool(asked.append(values)) or is_finite(values)
    )
    monkeypatch.setattr(packing, "_SLICE", 1)
    with _Operators() as operators:
        packing.pack_weight(weight, slot, rounding(spec))
    assert len(asked) == 2 * 3
    waits = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item"}
    assert not waits & set(operators.names)
    # Launches of some microseconds: slices are large enough for so many (see `_SLICE_ELSEWHERE`).
    assert len(operators.names) < 3 * 200


@pytest.mark.parametrize(
    ("format_name", "spec"),
    [
        ("int", IntSpec(group_size=8)),
        ("int", IntSpec(bits=3, group_size=8, sym=False)),
        ("int8", Int8Spec(activation="dynamic")),
        ("fp8", Fp8Spec()),
    ],
)
def test_a_weight_stays_on_its_device(
    format_name: str, spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta a tensor that comes from elsewhere, or goes there, is an error; slices are larger than on the CPU."""
    monkeypatch.setattr(affine, "_is_finite", lambda values: values.device.type == "meta")
    rows, columns = 4 * packing.ROW_CHUNK, 2 * packing._SLICE // packing.ROW_CHUNK
    slices: list[int] = []

    def encode(part: Tensor) -> QuantizedWeight:
        slices.append(len(part))
        return rounding(spec)(part)

    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
    slot = slot_of(format_name, spec, rows, columns)
    tensors = packing.pack_weight(weight, slot, encode)
    assert all(tensor.device.type == "meta" for tensor in tensors.values())
    assert slices == [rows] and rows * columns > packing._SLICE


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
