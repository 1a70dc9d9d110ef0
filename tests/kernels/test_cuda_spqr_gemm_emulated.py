"""Products of format ``spqr`` with more than 8 tokens (kernels/cuda/spqr_gemm.h), run on the CPU, against float64. No GPU is needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, Shape, name_of
from spqr_weights import prepared
from spqr_weights import random_weight as make
from torch import Tensor

from hfq.core import bits as bit_packing

BITS = (2, 3, 4)
# (N, K, group_size; 0: one group per row): odd numbers of rows, blocks and groups that are not full, chunks that end anywhere.
SHAPES = (
    (1, 8, 0),
    (17, 136, 16),
    (40, 520, 32),
    (33, 200, 0),
    (5, 1096, 48),
    (150, 264, 64),
    (280, 1032, 16),
    (20, 2056, 128),
)
# Bits of codes of scales, rows that share lines.
STATS = ((2, 16), (3, 64), (4, 32), (5, 128), (8, 16))


def _x(generator: torch.Generator, tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, bits: int) -> None:
    for stats, tokens, dtype, stat_dtype in zip(
        STATS, (9, 17, 64, 70, 16), HALVES * 3, FLOATS * 2, strict=False
    ):
        w = make(generator, shape, bits=bits, stats=stats, dtype=stat_dtype)
        x = _x(generator, tokens, shape[1], dtype)
        bias = torch.randn(shape[0], generator=generator) if tokens % 2 else None
        w.check(emulator.spqr_linear(x, w.ready, bias), x, bias)


@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 24, 32, 33, 50, 64, 65, 129])
@pytest.mark.parametrize(("group_size", "bits"), [(16, 3), (0, 4)])
def test_every_number_of_tokens(
    emulator: Any, generator: torch.Generator, tokens: int, group_size: int, bits: int
) -> None:
    w = make(generator, (37, 328, group_size), bits=bits)
    x = _x(generator, tokens, 328, torch.bfloat16)
    bias = torch.randn(37, generator=generator)
    y = emulator.spqr_linear(x, w.ready, bias)
    w.check(y, x, bias)
    assert torch.equal(y, emulator.spqr_linear(x, w.ready, bias)), "sums are in one order"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("outliers", [0.02, 0.0])
def test_every_cut(emulator: Any, generator: torch.Generator, bits: int, outliers: float) -> None:
    """Few and many multiprocessors: warps side by side in rows or in columns, one thread block for all columns or several."""
    w = make(generator, (290, 2184, 16), bits=bits, outliers=outliers)
    for tokens, multiprocessors, kib in itertools.product((12, 40), (1, 2, 7, 132), (99, 163, 227)):
        x = _x(generator, tokens, 2184, torch.bfloat16)
        w.check(emulator.spqr_linear(x, w.ready, None, multiprocessors, kib << 10), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 0])
def test_group_sizes(emulator: Any, generator: torch.Generator, group_size: int, bits: int) -> None:
    w = make(generator, (24, 1000, group_size), bits=bits)
    x = _x(generator, 11, 1000, torch.float16)
    w.check(emulator.spqr_linear(x, w.ready, None), x)


@pytest.mark.parametrize("stat_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    generator: torch.Generator,
    stat_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    for dtype, wide in itertools.product(HALVES, (False, True)):
        w = make(generator, (20, 104, 16), dtype=stat_dtype, wide=wide)
        x = _x(generator, 10, 104, dtype)
        bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
        w.check(emulator.spqr_linear(x, w.ready, bias), x, bias)


@pytest.mark.parametrize("tokens", [9, 20, 40])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 1.0])
def test_shares_of_outliers(
    emulator: Any, generator: torch.Generator, share: float, tokens: int
) -> None:
    """None, rows without any, and rows that are nothing else."""
    w = make(generator, (35, 200, 16), outliers=share)
    x = _x(generator, tokens, 200, torch.bfloat16)
    w.check(emulator.spqr_linear(x, w.ready, None), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_reaches_the_outputs_of_its_token(
    emulator: Any, generator: torch.Generator, bits: int, bad: float
) -> None:
    w = make(generator, (20, 136, 16), bits=bits)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = _x(generator, 18, 136, dtype)
        x[4, column] = bad
        finite = emulator.spqr_linear(x, w.ready, None).isfinite()
        assert not finite[4].any()
        assert finite[torch.arange(18) != 4].all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("line", range(4))
def test_lines_that_are_no_number_reach_the_outputs_of_their_rows(
    emulator: Any, generator: torch.Generator, bits: int, line: int
) -> None:
    w = make(generator, (40, 200, 16), bits=bits, stats=(3, 16))
    stats = w.ready.stats.clone()
    stats[1, -1, line] = torch.nan
    x = _x(generator, 9, 200, torch.bfloat16)
    finite = emulator.spqr_linear(x, replace(w.ready, stats=stats), None).isfinite()
    assert not finite[:, 16:32].any()
    assert finite[:, :16].all() and finite[:, 32:].all()


def test_outliers_that_are_no_number_reach_the_outputs_of_their_row(
    emulator: Any, generator: torch.Generator
) -> None:
    w = make(generator, (40, 200, 16))
    values = w.ready.values.clone()
    values[-1] = torch.nan
    row = int((w.ready.offsets < len(values)).sum()) - 1
    x = _x(generator, 9, 200, torch.bfloat16)
    finite = emulator.spqr_linear(x, replace(w.ready, values=values), None).isfinite()
    assert not finite[:, row].any()
    assert finite[:, torch.arange(40) != row].all()


@pytest.mark.parametrize("bits", BITS)
def test_codes_behind_the_columns_do_not_matter(
    emulator: Any, generator: torch.Generator, bits: int
) -> None:
    """With the last group's scale they would be infinite in float16, and infinity times an activation of zero is not zero."""
    w = make(generator, (16, 1032, 16), bits=bits, outliers=0.0, dtype=torch.float32)
    codes = bit_packing.unpack(w.neutral.qweight.squeeze(-1), bits, 1032)
    codes[:, 1024:] = 0
    stats = w.neutral.stats.clone()
    stats[:, -1] = torch.tensor([0.0, 7e4, 0.0, 0.0])  # codes times 70000
    packed = bit_packing.pack(codes, bits).unsqueeze(-1)
    ready = prepared(replace(w.neutral, qweight=packed, stats=stats))
    x = _x(generator, 9, 1032, torch.float16)
    assert emulator.spqr_linear(x, ready, None, multiprocessors=1).isfinite().all()


@pytest.fixture
def races_allowed(emulator: Any) -> Iterator[None]:
    emulator.watch_races(False)
    yield
    emulator.watch_races(emulator.races)


def test_wrong_indices_do_not_leave_the_buffers(
    emulator: Any, races_allowed: None, generator: torch.Generator
) -> None:
    """Checkpoints are checked before; the emulator stops at the first access that leaves what the kernel was given."""
    for wide in (False, True):
        grid = make(generator, (40, 104, 16), wide=wide).ready
        wild = torch.tensor([-5, 32767, 104, -32768]) * (70000 if wide else 1)
        wild = wild.clamp(-(2**31), 2**31 - 1).to(grid.columns.dtype).repeat(len(grid.columns))
        for changed in (
            {"columns": wild[: len(grid.columns)]},
            {"offsets": torch.full_like(grid.offsets, 2**31 - 1)},
            {"offsets": torch.full_like(grid.offsets, -(2**31))},
            {"offsets": grid.offsets.flip(0).contiguous()},
            {"offsets": torch.tensor([-(2**31), 2**31 - 1] * 21, dtype=torch.int32)[:41]},
        ):
            x = torch.ones(9, 104, dtype=torch.bfloat16)
            assert emulator.spqr_linear(x, replace(grid, **changed), None).isfinite().all()
