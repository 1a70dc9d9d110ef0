"""3-bit codes in planes: the native conversion is the reference, and both come back."""

from __future__ import annotations

import pytest
import torch

from hfq.core.bits import pack, unpack
from hfq.kernels import native, planes

SHAPES = ((0, 5), (1, 1), (3, 32), (7, 33), (40, 1000))  # rows, columns


@pytest.fixture(autouse=True)
def _native() -> None:
    native.load()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways(shape: tuple[int, int], generator: torch.Generator) -> None:
    codes = torch.randint(8, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, 3)
    split = torch.ops.hfq.split_planes(packed)
    assert split.shape == (shape[0], 12 * -(-shape[1] // 32))
    assert torch.equal(split, planes.split_planes(packed))
    joined = torch.ops.hfq.join_planes(split)
    assert torch.equal(joined, planes.join_planes(split))
    assert torch.equal(joined[:, : packed.shape[1]], packed)


def test_the_layout(generator: torch.Generator) -> None:
    """Column 16 h + 4 b + j: two bits in word h, the third is bit 4 h + j of byte b of word 2."""
    codes = torch.randint(8, (1, 32), generator=generator, dtype=torch.uint8)
    split = planes.split_planes(pack(codes, 3))
    assert torch.equal(unpack(split[:, :8], 2, 32), codes & 3)
    for column in range(32):
        h, b, j = column // 16, column % 16 // 4, column % 4
        assert (split[0, 8 + b] >> (4 * h + j)) & 1 == codes[0, column] >> 2


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 3, 1, dtype=torch.uint8), "must be of shape"),
        (torch.zeros(2, 12, dtype=torch.int8), "must be uint8"),
        (torch.zeros(2, 24, dtype=torch.uint8)[:, ::2], "must be contiguous"),
    ],
    ids=["shape", "dtype", "stride"],
)
def test_other_tensors_are_refused(codes: torch.Tensor, message: str) -> None:
    if not native.load().cpu:
        pytest.skip("the reference takes what PyTorch takes")
    for op in (torch.ops.hfq.split_planes, torch.ops.hfq.join_planes):
        with pytest.raises(RuntimeError, match=message):
            op(codes)
    with pytest.raises(RuntimeError, match="whole units of 12 bytes"):
        torch.ops.hfq.join_planes(torch.zeros(2, 13, dtype=torch.uint8))
