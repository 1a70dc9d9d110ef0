"""Packing on a GPU: kernels beside what PyTorch computes there, whole weights beside the CPU's."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from hfq.algorithms import ALGORITHMS
from hfq.core import affine
from hfq.core.bits import pack
from hfq.core.codebooks import codebook
from hfq.core.spec import CodebookSpec, Fp8Spec, Int8Spec, IntSpec, QuantSpec
from hfq.kernels import cuda_packing_ops, fragments
from hfq.nn.packing import pack_weight
from hfq.nn.slot import PackedSlot

pytestmark = pytest.mark.gpu

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 8, 8), (33, 136, 32), (5, 77, 10), (64, 4096, 128), (1000, 2056, 2056))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels(
    cuda: torch.device,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    rows, columns, size = shape
    weight = torch.randn(rows, columns, generator=generator).to(cuda, dtype)
    found = torch.ops.hfq.cuda_group_range(weight, size)
    for mine, wanted in zip(found, affine.group_range(weight, size), strict=True):
        assert torch.equal(mine, wanted)
    scales = torch.rand(found[0].shape, generator=generator).to(cuda)
    zeros = (torch.rand(found[0].shape, generator=generator) * 16).to(cuda)
    points = codebook("nf4", cuda)
    for bits, zero, table in (
        (4, None, None),
        (3, zeros, None),
        (8, None, None),
        (4, None, points),
    ):
        grid = (weight, scales, zero, table, bits, size)
        assert torch.equal(torch.ops.hfq.cuda_nearest_codes(*grid), affine.nearest_codes(*grid))


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_codes(cuda: torch.device, generator: torch.Generator, bits: int) -> None:
    for shape in ((1, 1), (3, 7), (100, 1000)):
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
        mine = torch.ops.hfq.cuda_pack_codes(codes.to(cuda), bits)
        assert torch.equal(mine.cpu(), pack(codes, bits))


@pytest.mark.parametrize(("bits", "halves"), list(itertools.product(fragments.BITS, (False, True))))
def test_to_fragments(
    cuda: torch.device, generator: torch.Generator, bits: int, halves: bool
) -> None:
    for lead, rows in (((), 33), ((3,), 48), ((2, 2), 9)):
        shape = (*lead, rows, 17 * bits, 1)
        neutral = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(cuda)
        mine = cuda_packing_ops.to_fragments(neutral, bits, halves)
        assert torch.equal(mine, fragments.to_fragments(neutral, bits, halves))


@pytest.mark.parametrize(
    ("format", "spec"),
    [
        ("int", IntSpec(bits=4, group_size=128)),
        ("int", IntSpec(bits=3, group_size=32)),
        ("nf4", CodebookSpec(codebook="nf4", group_size=64)),
        ("int8", Int8Spec()),
        ("fp8", Fp8Spec()),
    ],
    ids=str,
)
@pytest.mark.parametrize("experts", [None, 2])
def test_weights_are_those_of_the_cpu(
    cuda: torch.device,
    generator: torch.Generator,
    format: str,
    spec: QuantSpec,
    experts: int | None,
) -> None:
    """To the bit: scales of these formats are powers of two, or quotients of tensors, of what both find."""
    sizes = {"out_features": 300, "in_features": 1032, "experts": experts}
    slot = PackedSlot(base="weight", format=format, spec=spec, **sizes)
    weight = torch.randn(slot.float_shape, generator=generator).bfloat16()
    method = ALGORITHMS.get("rtn")
    encode = partial(method.quantize, spec=spec, options=method.options)
    wanted = pack_weight(weight, slot, encode)
    packed = pack_weight(weight.to(cuda), slot, encode)
    assert packed.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(packed[key].cpu().view(torch.uint8), tensor.view(torch.uint8)), key
