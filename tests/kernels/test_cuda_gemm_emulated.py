"""The CUDA kernels for more tokens, run on the CPU, against float64. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fragments_weights import HALVES, KINDS, SHAPES, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_only_bad, check_tokens_are_apart

# Bytes of shared memory that a thread block may have, of GPUs of compute capability 9.0, 8.0 and 8.9.
H100, A100, CONSUMER = 227 << 10, 163 << 10, 99 << 10
# (multiprocessors, bytes of shared memory): blocks of many rows, of few, columns split.
DEVICES = ((1, H100), (4, CONSUMER), (12, A100), (1 << 20, H100))


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_more_tokens(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype, device in zip(
        (*HALVES, *HALVES),
        (9, 33, 65, 20),
        (torch.float16, torch.float32, torch.bfloat16, torch.float16),
        DEVICES,
        strict=True,
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(emulator.linear(x, w.operands, bias, w.sizes, *device), x, bias)


@pytest.mark.parametrize("tokens", [9, 16, 17, 31, 64, 100])
@pytest.mark.parametrize("kind", [(4, "zeros"), (8, None), (4, "nf4")], ids=name_of)
def test_tokens_do_not_depend_on_their_neighbours(
    emulator: Any, generator: torch.Generator, tokens: int, kind: Kind
) -> None:
    w = make(generator, (76, 648, 64), kind)
    x = torch.randn(tokens, 648, generator=generator).bfloat16()
    check_tokens_are_apart(lambda x: emulator.linear(x, w.operands, None, w.sizes), w, x, generator)


def test_every_cut(emulator: Any, generator: torch.Generator) -> None:
    """Tiles of 16, 32 and 64 tokens, with rows and columns shared out among warps and thread blocks in every way."""
    cuts = set()
    for tokens, device, rows in itertools.product((16, 32, 64), DEVICES, (40, 272)):
        w = make(generator, (rows, 1160, 128), (8 if rows == 40 else 4, "zeros"))
        x = torch.randn(tokens, 1160, generator=generator).half()
        y = emulator.linear(x, w.operands, None, w.sizes, *device)
        w.check(y, x)
        plan = emulator.gemm_plan(tokens, w.sizes, "zeros", *device)
        cuts.add((plan.tokens, plan.column_shift, plan.splits > 1, plan.stages))
    assert {cut[0] for cut in cuts} == {16, 32, 64}
    assert {cut[1] for cut in cuts} == {0, 1, 2, 3}
    assert {cut[2] for cut in cuts} == {False, True}
    assert {cut[3] for cut in cuts} == {2, 3, 4}


def test_cuts_fit(emulator: Any) -> None:
    """Every column is somebody's, and shared memory is not more than there is."""
    for tokens, (bits, kind), device in itertools.product(
        (9, 30, 64, 200), KINDS, ((132, H100), (108, A100), (128, CONSUMER), (24, CONSUMER))
    ):
        for rows, columns in ((8, 32), (1000, 8), (4096, 4096), (28672, 8192), (300, 1048568)):
            plan = emulator.gemm_plan(tokens, (bits, 128, columns, rows), kind, *device)
            case = (tokens, bits, kind, device, rows, columns)
            chunks = -(-columns // (64 if bits == 8 else 128))
            assert plan.tokens in (16, 32, 64), case
            assert (plan.splits - 1) * plan.split_chunks < chunks, case
            assert plan.splits * plan.split_chunks >= chunks, case
            assert 2 <= plan.stages <= 4 and 1 <= plan.splits <= 16, case
            assert plan.shared_bytes <= device[1], case
            assert plan.stage_bytes % 16 == plan.sums_bytes % 16 == 0, case


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_among_more_tokens(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    w = make(generator, (20, 136, 64), kind)
    for dtype, column, multiprocessors in zip(HALVES, (135, 3), (1, 1 << 20), strict=True):
        x = torch.randn(19, 136, generator=generator).to(dtype)
        x[11, column] = bad
        check_only_bad(emulator.linear(x, w.operands, None, w.sizes, multiprocessors), 11)
    x = torch.randn(9, 136, generator=generator).bfloat16()
    w = w.with_bad_scale(13, 1)
    check_only_bad(emulator.linear(x, w.operands, None, w.sizes).T, 13)
