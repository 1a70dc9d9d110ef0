"""The CUDA kernels of format ``spqr``, run on the CPU, against float64 and the PyTorch reference. No GPU is needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_emulator import check_operators
from fragments_weights import FLOATS, HALVES, Shape, name_of
from spqr_weights import BITS, SHAPES, STATS, activations
from spqr_weights import random_weight as make

# With more than 8 tokens other kernels are taken (kernels/cuda/spqr_gemm.h).
few_and_many = pytest.mark.parametrize("tokens", [7, 18])
# Many rounds.
LONG = ((18, 2056, 16), (20, 4104, 128))


# ---- products


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG], ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, bits: int) -> None:
    for stats, tokens, dtype, stat_dtype in zip(
        STATS, (1, 5, 2, 8, 1), HALVES * 3, FLOATS * 2, strict=False
    ):
        w = make(generator, shape, bits=bits, stats=stats, dtype=stat_dtype)
        x = activations(generator, tokens, shape[1], dtype)
        w.check(emulator.spqr_linear(x, w.ready, None), x)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("group_size", "bits"), [(16, 3), (32, 3), (48, 2), (0, 4)])
def test_every_number_of_tokens(
    emulator: Any, generator: torch.Generator, tokens: int, group_size: int, bits: int
) -> None:
    w = make(generator, (37, 328, group_size), bits=bits)
    x = activations(generator, tokens, 328, torch.bfloat16)
    bias = torch.randn(37, generator=generator)
    y = emulator.spqr_linear(x, w.ready, bias)
    w.check(y, x, bias)
    alone = [emulator.spqr_linear(one, w.ready, bias) for one in x.split(1)]
    assert torch.equal(y, torch.cat(alone)), "a token's result depends on its neighbours"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 48, 32, 0])
def test_two_tiles_give_what_one_gives(
    emulator: Any, generator: torch.Generator, group_size: int, bits: int
) -> None:
    """One multiprocessor has enough tiles; their number is even, or odd and the last one not full."""
    for rows, tokens, wide, stat_dtype in zip(
        (64, 69, 80, 145), (2, 5, 8, 3), (3, 5, 3, 5), FLOATS * 2, strict=False
    ):
        w = make(
            generator,
            (rows, 1160, group_size),
            bits=bits,
            stats=(wide, 16 * tokens),
            dtype=stat_dtype,
        )
        x = activations(generator, tokens, 1160, HALVES[tokens % 2])
        y = emulator.spqr_linear(x, w.ready, None, multiprocessors=1)
        w.check(y, x)
        assert torch.equal(y, emulator.spqr_linear(x, w.ready, None))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("tokens", "multiprocessors", "shared_bytes"),
    [(1, 1, (28, 40, 54, 99, 163, 227)), (8, 99, (82, 99, 163, 227)), (7, 1, (99, 163, 227))],
)
def test_rings_of_any_depth_give_the_same(
    emulator: Any,
    generator: torch.Generator,
    tokens: int,
    multiprocessors: int,
    shared_bytes: tuple[int, ...],
    bits: int,
) -> None:
    """Steps of a warp from fewer than its ring's stages to several rounds. KiB; 99, 163 and 227 are those of GPUs."""
    for columns, group_size, stat_dtype in zip(
        (1032, 4104, 7240), (16, 48, 64), FLOATS, strict=True
    ):
        w = make(generator, (70, columns, group_size), bits=bits, dtype=stat_dtype)
        x = activations(generator, tokens, columns, torch.bfloat16)
        ys = [
            emulator.spqr_linear(x, w.ready, None, multiprocessors, size << 10)
            for size in shared_bytes
        ]
        w.check(ys[0], x)
        assert all(torch.equal(y, ys[0]) for y in ys)


@few_and_many
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 0])
def test_group_sizes(
    emulator: Any, generator: torch.Generator, group_size: int, bits: int, tokens: int
) -> None:
    w = make(generator, (24, 1000, group_size), bits=bits)
    x = activations(generator, tokens, 1000, torch.float16)
    w.check(emulator.spqr_linear(x, w.ready, None), x)


@few_and_many
@pytest.mark.parametrize("stat_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    generator: torch.Generator,
    stat_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    tokens: int,
) -> None:
    for dtype, wide in itertools.product(HALVES, (False, True)):
        w = make(generator, (20, 104, 16), dtype=stat_dtype, wide=wide)
        x = activations(generator, tokens, 104, dtype)
        bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
        w.check(emulator.spqr_linear(x, w.ready, bias), x, bias)


@pytest.mark.parametrize("tokens", [8, 9, 20, 40])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 1.0])
def test_shares_of_outliers(
    emulator: Any, generator: torch.Generator, share: float, bits: int, tokens: int
) -> None:
    """None, rows without any, and rows that are nothing else."""
    w = make(generator, (35, 200, 16), bits=bits, outliers=share)
    x = activations(generator, tokens, 200, torch.bfloat16)
    y = emulator.spqr_linear(x, w.ready, None)
    w.check(y, x)
    assert torch.equal(y, emulator.spqr_linear(x, w.ready, None)), "sums are in one order"


@few_and_many
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_reaches_the_outputs_of_its_token(
    emulator: Any, generator: torch.Generator, bits: int, bad: float, tokens: int
) -> None:
    w = make(generator, (20, 136, 16), bits=bits)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = activations(generator, tokens, 136, dtype)
        x[4, column] = bad
        finite = emulator.spqr_linear(x, w.ready, None).isfinite()
        assert not finite[4].any()
        assert finite[torch.arange(tokens) != 4].all()


@few_and_many
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("line", range(4))
def test_lines_that_are_no_number_reach_the_outputs_of_their_rows(
    emulator: Any, generator: torch.Generator, bits: int, line: int, tokens: int
) -> None:
    w = make(generator, (40, 200, 16), bits=bits, stats=(3, 16))
    stats = w.ready.stats.clone()
    stats[1, -1, line] = torch.nan
    x = activations(generator, tokens, 200, torch.bfloat16)
    finite = emulator.spqr_linear(x, replace(w.ready, stats=stats), None).isfinite()
    assert not finite[:, 16:32].any()
    assert finite[:, :16].all() and finite[:, 32:].all()


@few_and_many
def test_outliers_that_are_no_number_reach_the_outputs_of_their_row(
    emulator: Any, generator: torch.Generator, tokens: int
) -> None:
    w = make(generator, (40, 200, 16))
    values = w.ready.values.clone()
    values[-1] = torch.nan
    row = int((w.ready.offsets < len(values)).sum()) - 1
    x = activations(generator, tokens, 200, torch.bfloat16)
    finite = emulator.spqr_linear(x, replace(w.ready, values=values), None).isfinite()
    assert not finite[:, row].any()
    assert finite[:, torch.arange(40) != row].all()


def test_large_and_tiny_activations(emulator: Any, generator: torch.Generator) -> None:
    for bits in BITS:
        w = make(generator, (16, 64, 16), bits=bits)
        zero = torch.zeros(1, 64, dtype=torch.bfloat16)
        assert torch.equal(emulator.spqr_linear(zero, w.ready, None), zero[:, :16])
        for dtype, size in ((torch.bfloat16, 1e30), (torch.float16, 1e4), (torch.float16, 6e-8)):
            # One column each, so that no product leaves float16.
            x = torch.zeros(8, 64, dtype=dtype)
            x[torch.arange(8), torch.arange(8) * 8 + 1] = size
            y = emulator.spqr_linear(x, w.ready, None)
            assert y.isfinite().all()
            w.check(y, x)


# ---- rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG], ids=name_of)
def test_dequantize_is_the_reference(
    emulator: Any, generator: torch.Generator, shape: Shape, bits: int
) -> None:
    for stats, (stat_dtype, dtype) in zip(
        STATS * 2, itertools.product(FLOATS, FLOATS), strict=False
    ):
        w = make(generator, shape, bits=bits, stats=stats, outliers=0.05, dtype=stat_dtype)
        assert torch.equal(emulator.spqr_unpack(None, w.ready, dtype), w.reference(dtype))


@pytest.mark.parametrize("bits", BITS)
def test_lookup_gives_rows_of_the_dequantized_weight(
    emulator: Any, generator: torch.Generator, bits: int
) -> None:
    w = make(generator, (45, 264, 16), bits=bits)
    for dtype, count in zip(FLOATS, (1, 16, 33), strict=True):
        index = torch.randint(45, (count,), generator=generator)
        rows = emulator.spqr_unpack(index, w.ready, dtype)
        assert torch.equal(rows, w.reference(dtype)[index])
    outside = torch.tensor([3, -1, 45, 44])
    rows = emulator.spqr_unpack(outside, w.ready, torch.float32)
    assert rows.isnan().all(1).tolist() == [False, True, True, False]


@pytest.fixture
def races_allowed(emulator: Any) -> Iterator[None]:
    emulator.watch_races(False)
    yield
    emulator.watch_races(emulator.races)


@few_and_many
def test_wrong_indices_do_not_leave_the_buffers(
    emulator: Any, races_allowed: None, generator: torch.Generator, tokens: int
) -> None:
    """Checkpoints are checked before; the emulator stops at the first access that leaves what the kernel was given.

    (Two outliers may be one weight's then: who writes it last is no matter.)
    """
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
            damaged = replace(grid, **changed)
            x = torch.ones(tokens, 104, dtype=torch.bfloat16)
            assert emulator.spqr_linear(x, damaged, None).isfinite().all()
            assert emulator.spqr_unpack(None, damaged, torch.bfloat16).isfinite().all()


def test_rows_of_a_larger_weight(emulator: Any, generator: torch.Generator) -> None:
    """Offsets of some rows, columns and values of all: how a large weight is dequantized in parts."""
    w = make(generator, (96, 136, 16), stats=(3, 32))
    part = replace(
        w.ready,
        qweight=w.ready.qweight[2:],
        stat_codes=w.ready.stat_codes[2:],
        stats=w.ready.stats[1:],
        offsets=w.ready.offsets[32:],
        out_features=64,
    )
    dense = emulator.spqr_unpack(None, part, torch.float32)
    assert torch.equal(dense, w.reference(torch.float32)[32:])


# ---- operators


def test_operators_and_modules(emulator: Any) -> None:
    """The binding, the row and modules with it: on CPU tensors, in a process whose CPU is the emulated GPU."""
    check_operators(emulator.folder, "check_spqr.py")


# ---- all of them


def _every_case() -> Iterator[Any]:
    for bits, group_size, (stat_bits, _), dtype in itertools.product(
        BITS, (16, 32, 48, 96, 128, 0), STATS, HALVES
    ):
        name = f"{bits}-{group_size}-{stat_bits}-{dtype}"
        yield pytest.param(bits, group_size, stat_bits, dtype, id=name)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size", "stat_bits", "dtype"), list(_every_case()))
def test_every_combination(
    emulator: Any,
    generator: torch.Generator,
    bits: int,
    group_size: int,
    stat_bits: int,
    dtype: torch.dtype,
) -> None:
    for (rows, columns), tokens, share in zip(
        ((1, 40), (17, 1000), (40, 328), (64, 4096)),
        (1, 11, 8, 2),
        (1.0, 0.01, 0.1, 0),
        strict=True,
    ):
        w = make(
            generator,
            (rows, columns, group_size),
            bits=bits,
            stats=(stat_bits, 64),
            outliers=share,
            dtype=FLOATS[rows % 3],
        )
        x = activations(generator, tokens, columns, dtype)
        bias = torch.randn(rows, generator=generator) if tokens % 2 else None
        w.check(emulator.spqr_linear(x, w.ready, bias), x, bias)
