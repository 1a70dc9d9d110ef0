"""What every packed layout promises; runs for each registered format and all that it can store."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.errors import CheckpointError
from hfq.core.spec import QuantSpec
from hfq.core.weight import Grid, QuantizedWeight
from hfq.formats import FORMATS, ROW_CHUNK, TensorLayout, check_tensors
from hfq.kernels import dispatch

pytestmark = [pytest.mark.every_spec, pytest.mark.usefixtures("one_thread")]

SHAPES = [(3, 21), (1, 1), (2, 130), (5, 8), (0, 7), (4, 5)]

MakeWeight = Callable[..., Tensor]


def quantize(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    return affine.encode(weight, *affine.range_grid(weight, spec), spec)


def same(left: Tensor | None, right: Tensor | None) -> bool:
    """Equal to the bit, or both missing."""
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left, right)


def dequantize(grid: Grid, dtype: torch.dtype) -> Tensor:
    weight: Tensor = dispatch.rows(type(grid))[-1].dequantize(grid, dtype)
    return weight


def test_layout_is_what_pack_gives(
    format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    packed_format = FORMATS.get(format_name)
    for rows, columns in SHAPES:
        tensors = packed_format.pack(quantize(random_weight(rows, columns), spec))
        layout = packed_format.layout(spec, rows, columns)
        found = {key: TensorLayout(tuple(t.shape), t.dtype) for key, t in tensors.items()}
        assert found == layout
        assert list(found) == list(layout)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        check_tensors("module", tensors, layout)


def test_a_loader_that_knows_no_formats_meets_a_wrong_shape(
    format_name: str, spec: QuantSpec
) -> None:
    layout = FORMATS.get(format_name).layout(spec, 6, 10)
    assert len(layout["weight"].shape) == 3 and not layout["weight"].dtype.is_floating_point
    assert all(key.startswith("weight") for key in layout)


def test_unpack_inverts_pack(format_name: str, spec: QuantSpec, random_weight: MakeWeight) -> None:
    packed_format = FORMATS.get(format_name)
    for rows, columns in SHAPES:
        weight = quantize(random_weight(rows, columns), spec)
        again = packed_format.unpack(packed_format.pack(weight), spec, columns)
        assert again.spec == spec
        assert same(again.codes, weight.codes)
        assert same(again.scales, weight.scales)
        assert same(again.zeros, weight.zeros)
        assert same(again.g_idx, weight.g_idx)
        assert same(again.dequantize(), weight.dequantize())


def test_packing_again_gives_the_same_bytes(
    format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    packed_format = FORMATS.get(format_name)
    tensors = packed_format.pack(quantize(random_weight(3, 21), spec))
    again = packed_format.pack(packed_format.unpack(tensors, spec, 21))
    assert again.keys() == tensors.keys()
    assert all(same(again[key], tensors[key]) for key in tensors)


def test_rows_are_packed_in_pieces(
    format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    packed_format = FORMATS.get(format_name)
    weight = random_weight(2 * ROW_CHUNK + 3, 7)
    whole = packed_format.pack(quantize(weight, spec))
    pieces = [packed_format.pack(quantize(rows, spec)) for rows in weight.split(ROW_CHUNK)]
    for key, tensor in whole.items():
        assert same(torch.cat([piece[key] for piece in pieces]), tensor)


def test_the_grid_has_the_values_of_the_codes(
    format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    packed_format = FORMATS.get(format_name)
    for (rows, columns), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        weight = quantize(random_weight(rows, columns), spec)
        grid = packed_format.grid(packed_format.pack(weight), spec, rows, columns)
        assert (grid.out_features, grid.in_features, grid.bits) == (rows, columns, spec.bits)
        assert grid.group_size >= 1
        assert same(dequantize(grid, dtype), weight.dequantize(dtype))


def test_a_stack_of_weights_is_its_weights(
    format_name: str, spec: QuantSpec, random_weight: MakeWeight
) -> None:
    packed_format = FORMATS.get(format_name)
    weights = [quantize(random_weight(70, 21), spec) for _ in range(3)]
    packed = [packed_format.pack(weight) for weight in weights]
    stack = {key: torch.stack([tensors[key] for tensors in packed]) for key in packed[0]}
    grid = packed_format.grid(stack, spec, 70, 21)
    for index, weight in enumerate(weights):
        assert same(dequantize(grid.expert(index), torch.float32), weight.dequantize())
    packed_format.check_values(stack, 21)


def test_damage_is_named(format_name: str, spec: QuantSpec, random_weight: MakeWeight) -> None:
    packed_format = FORMATS.get(format_name)
    layout = packed_format.layout(spec, 3, 21)
    tensors = packed_format.pack(quantize(random_weight(3, 21), spec))
    for key in layout:
        missing = {name: tensor for name, tensor in tensors.items() if name != key}
        with pytest.raises(CheckpointError, match=rf"mlp.up: the packed tensor '{key}' .* missing"):
            check_tensors("mlp.up", missing, layout)
        if not len(tensors[key]):
            continue
        shorter = {**tensors, key: tensors[key][1:]}
        with pytest.raises(CheckpointError, match=rf"mlp.up: expected packed tensor '{key}'"):
            check_tensors("mlp.up", shorter, layout)
        cast = {**tensors, key: tensors[key].double()}
        with pytest.raises(CheckpointError, match=r"got \(.*\) and torch.float64"):
            check_tensors("mlp.up", cast, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS.names())
def test_a_gpu_writes_the_same_bytes(
    name: str, random_weight: MakeWeight, cuda: torch.device
) -> None:
    packed_format, weight = FORMATS.get(name), random_weight(70, 300)
    spec = packed_format.spec({})
    here = packed_format.pack(quantize(weight, spec))
    there = packed_format.pack(quantize(weight.to(cuda), spec))
    assert all(same(there[key].cpu(), here[key]) for key in here)
