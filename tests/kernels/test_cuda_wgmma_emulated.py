"""The CUDA kernels with wgmma, run on the CPU, against a float64 reference. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.kernels import fragments


def _module(name: str) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_WEIGHTS = _module("test_cuda_emulated")
make, KINDS, HALVES, FLOATS = (
    _WEIGHTS.make,
    _WEIGHTS.KINDS,
    _WEIGHTS.HALVES,
    _WEIGHTS.FLOATS,
)
# (N, K, group_size; 0: one group per row): rows that fill no tile, warpgroup or block; columns that end in a chunk; groups of all kinds.
SHAPES = (
    (1, 8, 0),
    (17, 136, 32),
    (70, 264, 64),
    (130, 520, 128),
    (33, 200, 0),
    (5, 1096, 96),
    (272, 392, 160),
)
# One block for all columns, clusters of up to eight.
ALONE, CLUSTERS = 1, 1 << 20


def _name(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "1")


def _linear(
    emulator: Any, x: Tensor, weight: Any, bias: Tensor | None = None, multiprocessors: int = ALONE
) -> Tensor:
    y: Tensor = emulator.linear(
        x, weight.operands, bias, weight.sizes, multiprocessors, capability=90
    )
    return y


# ---- the emulator itself


def test_wgmma_is_what_is_documented(emulator: Any, generator: torch.Generator) -> None:
    columns = torch.randn(16, 16, generator=generator).bfloat16()
    y = emulator.self_check("wgmma", columns.view(torch.int32).view(-1)).view(torch.float32)
    for warp, lane in itertools.product(range(4), range(32)):
        row, column = lane // 4 + warp % 2 * 8, warp // 2 * 8 + 2 * (lane % 4)
        assert y[32 * warp + lane] == columns[column, row], (warp, lane)
    early = emulator.self_check("wgmma_no_wait", columns.view(torch.int32).view(-1))
    assert early.view(torch.float32).isnan().all()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("no_proxy_fence", "no fence.proxy.async covers"),
        ("no_fence", "without wgmma.fence"),
        ("memory_changes", "shared memory changes while wgmma reads it"),
        ("registers_change", "registers change while wgmma reads them"),
        ("other_descriptor", "warps of a group start different instructions"),
        ("not_aligned", "does not begin with its pattern"),
    ],
)
def test_mistakes_are_seen(emulator: Any, mistake: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        emulator.self_check(f"wgmma_{mistake}", torch.zeros(128, dtype=torch.int32))


def _wrong(emulator: Any, kernel: str, x: Tensor, y: Tensor) -> bool:
    """Whether the kernel fails, or gives anything but `y`."""
    try:
        return not torch.equal(emulator.self_check(kernel, x)[: len(y)], y)
    except RuntimeError:
        return True


def test_a_missing_barrier_is_seen(emulator: Any, generator: torch.Generator) -> None:
    x = torch.randn(256, generator=generator).bfloat16().view(torch.int32)
    assert _wrong(emulator, "wgmma_no_barrier", x, emulator.self_check("wgmma", x))


def test_barriers_in_shared_memory(emulator: Any, generator: torch.Generator) -> None:
    x = torch.randint(1 << 10, (128,), generator=generator, dtype=torch.int32)
    expected = torch.zeros(32, dtype=torch.int32)
    for i, j in itertools.product(range(7), range(3)):
        expected = 3 * expected + x[(torch.arange(32) + 32 * j + i) % 128]
    assert torch.equal(emulator.self_check("ring", x)[:32], expected)
    assert _wrong(emulator, "ring_no_wait", x, expected)
    assert _wrong(emulator, "ring_filled_too_early", x, expected)
    with pytest.raises(RuntimeError, match="threads wait for others"):
        emulator.self_check("ring_too_many_expected", x)


def test_blocks_of_a_cluster_read_each_other(emulator: Any) -> None:
    x = torch.arange(128, dtype=torch.int32)
    y = emulator.self_check("sum_of_cluster", x).view(torch.float32)[:32].view(4, 8)
    expected = 15.0 * x[1:33:4] + 0 * 8 + 1 * 4 + 2 * 2 + 3
    assert torch.equal(y, expected.expand(4, 8))
    with pytest.raises(RuntimeError, match="read from a block that has ended"):
        emulator.self_check("sum_of_cluster_that_ends", x)


# ---- products


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_products(
    emulator: Any,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    kind: tuple[int, str | None],
) -> None:
    for dtype, tokens, scale_dtype, multiprocessors in zip(
        (*HALVES, *HALVES),
        (9, 20, 64, 130),
        (torch.float16, torch.float32, torch.bfloat16, torch.float16),
        (ALONE, CLUSTERS, CLUSTERS, ALONE),
        strict=True,
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(_linear(emulator, x, w, bias, multiprocessors), x, bias)


@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 31, 32, 33, 63, 65, 100, 128, 129, 257])
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's: neither on those that exist nor on memory where none is."""
    w = make(generator, (76, 648, 64), (4, "zeros"))
    x = torch.randn(tokens, 648, generator=generator).bfloat16()
    y = _linear(emulator, x, w)
    w.check(y, x)
    order = torch.randperm(tokens, generator=generator)
    assert torch.equal(_linear(emulator, x[order], w), y[order])


@pytest.mark.parametrize("splits", range(1, 9))
@pytest.mark.parametrize("tokens", [16, 70])
def test_every_cluster(emulator: Any, generator: torch.Generator, splits: int, tokens: int) -> None:
    """Columns shared out among up to eight blocks, the last one with fewer."""
    w = make(generator, (270, 128 * 2 * splits + 72, 128), (4, None))
    x = torch.randn(tokens, w.sizes[2], generator=generator).half()
    bias = torch.randn(270, generator=generator)
    w.check(_linear(emulator, x, w, bias, CLUSTERS), x, bias)


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
        x = torch.randn(12, 104, generator=generator).to(dtype)
        bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
        w.check(_linear(emulator, x, w, bias), x, bias)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: tuple[int, str | None], bad: float
) -> None:
    w = make(generator, (20, 136, 64), kind)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = torch.randn(19, 136, generator=generator).to(dtype)
        x[11, column] = bad
        finite = _linear(emulator, x, w).isfinite()
        assert not finite[11].any()
        assert finite[torch.arange(19) != 11].all()
    scales = w.neutral[1]
    scales[13, 1] = torch.nan
    operands = (w.operands[0], fragments.to_fragments(scales, w.sizes[0]), *w.operands[2:])
    x = torch.randn(9, 136, generator=generator).bfloat16()
    finite = emulator.linear(x, operands, None, w.sizes, capability=90).isfinite()
    assert not finite[:, 13].any()
    assert finite[:, torch.arange(20) != 13].all()


def test_the_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it is wanted, only on compute capability 9.0: in little shared memory, which these kernels refuse."""
    w = make(generator, (64, 264, 64), (4, None))
    x = torch.randn(40, 264, generator=generator).bfloat16()

    def linear(tokens: int, capability: int) -> None:
        own = x[:tokens]
        y = emulator.linear(own, w.operands, None, w.sizes, ALONE, 99 << 10, capability)
        w.check(y, own)

    with pytest.raises(RuntimeError, match="does not run here: shared memory"):
        linear(40, 90)
    linear(8, 90)
    linear(40, 80)
    linear(40, 100)  # which has other instructions
    for value in ("0", ""):
        monkeypatch.setenv("HFQ_CUDA_WGMMA", value)
        linear(40, 90)
    monkeypatch.delenv("HFQ_CUDA_WGMMA")
    linear(40, 90)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 256, 0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_combination(
    emulator: Any,
    generator: torch.Generator,
    kind: tuple[int, str | None],
    group_size: int,
    dtype: torch.dtype,
) -> None:
    cases = (((40, 1000), ALONE, (11, 70)), ((17, 1608), CLUSTERS, (33, 16)))
    for (rows, columns), multiprocessors, numbers in cases:
        w = make(generator, (rows, columns, group_size), kind)
        for tokens in numbers:
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            bias = torch.randn(rows, generator=generator) if tokens % 2 else None
            w.check(_linear(emulator, x, w, bias, multiprocessors), x, bias)
