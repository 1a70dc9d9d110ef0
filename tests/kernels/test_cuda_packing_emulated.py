"""The CUDA kernels that pack weights, run on the CPU: to the bit what PyTorch computes. See cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cuda_emulator import check_operators

from hfq.core import affine
from hfq.core.bits import pack
from hfq.core.codebooks import codebook
from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.kernels import fragments

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
# (N, K, group size): short last groups, groups and rows that are not in eights, one group, more than a thread block has.
SHAPES = (
    (1, 1, 1),
    (3, 40, 8),
    (5, 33, 5),
    (7, 24, 24),
    (2, 200, 64),
    (9, 128, 32),
    (3, 2100, 128),
)
SPECS: tuple[QuantSpec, ...] = (
    *(IntSpec(bits=bits, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    CodebookSpec(codebook="nf4"),
    CodebookSpec(codebook="fp4"),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_group_range(
    emulator: Any, generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, columns, size = shape
    weight = torch.randn(rows + 2, columns, generator=generator).to(dtype)
    weight[0] = 0
    weight[1] = -weight[1].abs()
    for part in (weight[:rows], weight[1:][:rows], weight[2:]):
        for mine, wanted in zip(
            emulator.group_range(part, size), affine.group_range(part, size), strict=True
        ):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_no_number_is_seen(
    emulator: Any, generator: torch.Generator, value: float, dtype: torch.dtype
) -> None:
    for column in (0, 31, 77, 99):
        weight = torch.randn(3, 100, generator=generator).to(dtype)
        weight[1, column] = value
        for mine, wanted in zip(
            emulator.group_range(weight, 64), affine.group_range(weight, 64), strict=True
        ):
            assert torch.equal(mine.isnan(), wanted.isnan())
            assert torch.equal(mine.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nearest_codes(
    emulator: Any, generator: torch.Generator, shape: tuple[int, int, int], spec: QuantSpec
) -> None:
    """On the grid of the range, on a narrow one that cuts off, on scales that are 0 or too small; ties."""
    rows, columns, size = shape
    points = codebook(spec.codebook) if isinstance(spec, CodebookSpec) else None
    for dtype in FLOATS:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        weight[:, ::3] = (weight[:, ::3] * 4).round() / 8  # ties of a scale of 1/4
        groups = -(-columns // size)
        random = torch.rand(rows, groups, generator=generator)
        zeros = None
        if isinstance(spec, IntSpec) and not spec.sym:
            zeros = (torch.rand(rows, groups, generator=generator) * 2**spec.bits).round()
            zeros[0] += 0.25
        for scales in (random, -random / 10, torch.full_like(random, 0.25)):
            scales = scales.clone()
            scales[-1, -1] = (0.0, 1e-40)[rows % 2]
            grid = (weight, scales, zeros, points, spec.bits, size)
            assert torch.equal(emulator.nearest_codes(*grid), affine.nearest_codes(*grid))


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_codes(emulator: Any, generator: torch.Generator, bits: int) -> None:
    for shape in ((1, 1), (3, 7), (2, 8), (5, 100), (1, 777)):
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
        assert torch.equal(emulator.pack_codes(codes, bits), pack(codes, bits))


@pytest.mark.parametrize(("bits", "halves"), list(itertools.product(fragments.BITS, (False, True))))
@pytest.mark.parametrize("shape", [(1, 8), (16, 64), (17, 136), (45, 264), (33, 128)], ids=str)
def test_to_fragments(
    emulator: Any, generator: torch.Generator, shape: tuple[int, int], bits: int, halves: bool
) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    neutral = pack(codes, bits).unsqueeze(-1)
    mine = emulator.to_fragments(neutral, bits, halves)
    assert torch.equal(mine, fragments.to_fragments(neutral, bits, halves))


def test_operators(emulator: Any) -> None:
    """The bindings: on CPU tensors, in a process whose CPU is the emulated GPU."""
    check_operators(emulator.folder, "check_packing.py")
