"""The CUDA kernel whose thread blocks go through many tiles, run on the CPU, against float64. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, SHAPES, Kind, Shape, Weight, name_of
from fragments_weights import random_weight as make
from torch import Tensor

# Tiles that fill no round of thread blocks, stages that are not full, more stages than a ring has.
MORE_SHAPES = ((100, 1096, 96), (90, 2312, 32), (50, 1024, 0))
THREADS = 288  # of a thread block of this kernel only


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_STREAM", "1")


def _linear(
    emulator: Any,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *device: int,
) -> Tensor:
    """`device`: multiprocessors, shared memory of a thread block."""
    y: Tensor = emulator.linear(
        x, weight.operands, bias, weight.sizes, *(device or (2,)), capability=90
    )
    assert emulator.threads_of_a_block() == THREADS
    return y


def _check(w: Weight, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
    raw = w.sizes[0] == 4 and w.operands[3] is None and x.dtype == torch.bfloat16
    w.check(y, x, bias, offset=128 + 8 if raw else 0)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", [*SHAPES, *MORE_SHAPES], ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype in zip(
        HALVES, (1, 5), (torch.float16, torch.float32), strict=True
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        _check(w, _linear(emulator, x, w), x)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_more_tokens(emulator: Any, generator: torch.Generator, kind: Kind) -> None:
    for shape, dtype, tokens in (((37, 328, 64), HALVES[0], 9), ((90, 1160, 0), HALVES[1], 16)):
        w = make(generator, shape, kind)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        _check(w, _linear(emulator, x, w), x)


def _shared_bytes_for(emulator: Any, x: Tensor, w: Weight, splits: int) -> int:
    """With so much shared memory as many thread blocks share the columns."""
    for kib in range(227, 40, -1):
        if emulator.stream_splits(x, w.operands, w.sizes, kib << 10) == splits:
            return kib << 10
    raise AssertionError(f"no shared memory that makes clusters of {splits}")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [6, 13])
def test_clusters(
    emulator: Any, generator: torch.Generator, tokens: int, splits: int, kind: Kind
) -> None:
    """Columns shared out among the blocks of a cluster, the last one with fewer; one and several clusters, many rounds and one."""
    columns = {2: 2312, 4: 3528, 8: 5096}[splits]
    w = make(generator, (75, columns, 96), kind)
    x = torch.randn(tokens, columns, generator=generator).half()
    bias = torch.randn(75, generator=generator)
    shared_bytes = _shared_bytes_for(emulator, x, w, splits)
    first = _linear(emulator, x, w, bias, splits, shared_bytes)
    _check(w, first, x, bias)
    assert torch.equal(_linear(emulator, x, w, bias, 3 * splits, shared_bytes), first)


@pytest.mark.parametrize("group_size", [256, 512, 1024])
def test_slices_that_begin_within_a_group(
    emulator: Any, generator: torch.Generator, group_size: int
) -> None:
    for kind, splits, columns in (
        ((8, None), 2, 2304),
        ((4, "zeros"), 4, 3456),
        ((2, None), 8, 5504),
    ):
        w = make(generator, (75, columns, group_size), kind)
        x = torch.randn(5, columns, generator=generator).bfloat16()
        shared_bytes = _shared_bytes_for(emulator, x, w, splits)
        _check(w, _linear(emulator, x, w, None, 2 * splits, shared_bytes), x)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    w = make(generator, (37, 328, 64), (4, "zeros"))
    x = torch.randn(tokens, 328, generator=generator).bfloat16()
    bias = torch.randn(37, generator=generator)
    y = _linear(emulator, x, w, bias)
    _check(w, y, x, bias)
    alone = torch.cat([_linear(emulator, one, w, bias) for one in x.split(1)])
    assert torch.equal(y, alone), "a token's result depends on its neighbours"


@pytest.mark.parametrize("kind", [(4, None), (8, None)], ids=name_of)
@pytest.mark.parametrize("tiles", range(1, 8))
def test_tiles_are_shared_out(
    emulator: Any, generator: torch.Generator, tiles: int, kind: Kind
) -> None:
    """Thread blocks with odd numbers of tiles and with none of a pair's second; a row is computed alike wherever it is."""
    w = make(generator, (16 * tiles - 3, 1160, 128), kind)
    x = torch.randn(3, 1160, generator=generator).half()
    results = [_linear(emulator, x, w, None, multiprocessors) for multiprocessors in (1, 2, 3, 132)]
    _check(w, results[0], x)
    assert all(torch.equal(y, results[0]) for y in results)


def test_rings_of_any_size(emulator: Any, generator: torch.Generator) -> None:
    """From the fewest stages on; stages are used again while others read the ones before."""
    w = make(generator, (90, 2312, 64), (3, "zeros"))
    x = torch.randn(2, 2312, generator=generator).bfloat16()
    results = [_linear(emulator, x, w, None, 1, kib << 10) for kib in (80, 100, 227)]
    _check(w, results[0], x)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    generator: torch.Generator,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    for kind, dtype in itertools.product(((4, "zeros"), (8, None)), HALVES):
        w = make(generator, (20, 104, 32), kind, scale_dtype=scale_dtype)
        x = torch.randn(2, 104, generator=generator).to(dtype)
        bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
        _check(w, _linear(emulator, x, w, bias), x, bias)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    w = make(generator, (36, 136, 64), kind)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = torch.randn(7, 136, generator=generator).to(dtype)
        x[4, column] = bad
        finite = _linear(emulator, x, w).isfinite()
        assert not finite[4].any()
        assert finite[torch.arange(7) != 4].all()
    x = torch.randn(3, 136, generator=generator).bfloat16()
    finite = _linear(emulator, x, w.with_bad_scale(13, 1)).isfinite()
    assert not finite[:, 13].any()
    assert finite[:, torch.arange(36) != 13].all()


def test_the_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def streams(tokens: int, columns: int, kind: Kind = (4, None), *device: int) -> bool:
        w = make(generator, (16, columns, 128), kind)
        x = torch.randn(tokens, columns, generator=generator).bfloat16()
        multiprocessors, capability, shared_bytes = device or (132, 90, 227 << 10)
        y = emulator.linear(x, w.operands, None, w.sizes, multiprocessors, shared_bytes, capability)
        _check(w, y, x)
        found: bool = emulator.threads_of_a_block() == THREADS
        return found

    assert streams(1, 14336) and streams(8, 4096)
    assert streams(1, 4096, (4, None), 132, 120, 99 << 10)
    assert streams(8, 14336) and streams(16, 14336)  # whose activations are shared out
    assert not streams(16, 65536)
    assert not streams(16, 14336, (4, "nf4"), 132, 120, 99 << 10)
    assert not streams(17, 256)
    assert not streams(1, 256, (4, None), 132, 89, 99 << 10)  # which has no copies in bulk
    monkeypatch.setenv("HFQ_CUDA_STREAM", "0")
    assert not streams(1, 256)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 256, 0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_combination(
    emulator: Any, generator: torch.Generator, kind: Kind, group_size: int, dtype: torch.dtype
) -> None:
    for (rows, columns), tokens in itertools.product(((40, 1000), (17, 3080)), (1, 4, 7)):
        w = make(generator, (rows, columns, group_size), kind)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator) if tokens % 2 else None
        _check(w, _linear(emulator, x, w, bias), x, bias)
