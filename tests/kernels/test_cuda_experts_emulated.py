"""The CUDA kernels for fused experts, run on the CPU, against float64. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_emulator import check_operators
from fragments_weights import HALVES, KINDS, Kind, Weight, name_of
from fragments_weights import random_weight as make
from torch import Tensor

# Bytes of shared memory that a thread block may have, of GPUs of compute capability 8.0 and 8.9.
A100, CONSUMER = 163 << 10, 99 << 10


def _stacked(experts: list[Weight]) -> tuple[tuple[Tensor | None, ...], tuple[int, int, int, int]]:
    """Operands of a stack, and sizes."""
    first = experts[0]
    operands: list[Tensor | None] = []
    for index in range(3):
        each = [one.operands[index] for one in experts]
        operands.append(None if each[0] is None else torch.stack(each))  # type: ignore[arg-type]
    return (*operands, first.operands[3]), first.sizes


def _check_experts(
    y: Tensor, x: Tensor, counts: Tensor, experts: list[Weight], bias: Tensor | None
) -> None:
    """Each expert's tokens met its weight; zeros are behind them."""
    first = 0
    for index, (count, weight) in enumerate(zip(counts.tolist(), experts, strict=True)):
        own = slice(first, first + count)
        weight.check(y[own], x[own], None if bias is None else bias[index])
        first += count
    assert torch.equal(y[first:], torch.zeros_like(y[first:]))


def _routings(experts: int, tokens: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Counts that add up to at most `tokens`."""
    counts = torch.zeros(experts, dtype=torch.int64)
    yield counts
    for expert in {0, experts // 2, experts - 1}:
        alone = counts.clone()
        alone[expert] = tokens
        yield alone
    # Numbers above the experts belong to none of them.
    for outside in (0, 2):
        chosen = torch.randint(experts + outside, (tokens,), generator=generator)
        yield torch.bincount(chosen, minlength=experts)[:experts]
    yield torch.bincount(chosen % 2 * (experts - 1), minlength=experts)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_experts(emulator: Any, generator: torch.Generator, count: int, kind: Kind) -> None:
    for shape, dtype, with_bias in (
        ((37, 200, 64), HALVES[0], True),
        ((16, 136, 0), HALVES[1], False),
    ):
        experts = [make(generator, shape, kind) for _ in range(count)]
        operands, sizes = _stacked(experts)
        bias = torch.randn(count, shape[0], generator=generator) if with_bias else None
        for tokens, multiprocessors in ((1, 0), (9, 1 << 20), (33, 0)):
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            for counts in _routings(count, tokens, generator):
                y = emulator.experts_linear(x, counts, operands, bias, sizes, multiprocessors)
                _check_experts(y, x, counts, experts, bias)


@pytest.mark.parametrize("tokens", [30, 80, 260])
@pytest.mark.parametrize("kind", [(4, "zeros"), (3, None), (8, None), (4, "nf4")], ids=name_of)
def test_experts_with_many_tokens(
    emulator: Any, generator: torch.Generator, kind: Kind, tokens: int
) -> None:
    """In runs of 16, 32 and 64; some experts have none, or fewer than others."""
    experts = [make(generator, (37, 200, 64), kind) for _ in range(3)]
    operands, sizes = _stacked(experts)
    bias = torch.randn(3, 37, generator=generator)
    x = torch.randn(tokens, 200, generator=generator).bfloat16()
    for counts in _routings(3, tokens, generator):
        y = emulator.experts_linear(x, counts, operands, bias, sizes, 1)
        _check_experts(y, x, counts, experts, bias)


@pytest.mark.parametrize("tokens", range(1, 41))
def test_experts_with_every_number_of_tokens(
    emulator: Any, generator: torch.Generator, tokens: int
) -> None:
    experts = [make(generator, (21, 72, 32), (4, None)) for _ in range(3)]
    operands, sizes = _stacked(experts)
    bias = torch.randn(3, 21, generator=generator).half()
    x = torch.randn(tokens, 72, generator=generator).bfloat16()
    for counts in _routings(3, tokens, generator):
        y = emulator.experts_linear(x, counts, operands, bias, sizes)
        _check_experts(y, x, counts, experts, bias)
        # The very numbers of cuda_linear, and no others with two tiles of rows.
        first = 0
        for index, count in enumerate(counts.tolist()):
            own = x[first : first + count]
            alone = emulator.linear(own, experts[index].operands, bias[index], sizes)
            assert torch.equal(y[first : first + count], alone)
            first += count
        assert torch.equal(y, emulator.experts_linear(x, counts, operands, bias, sizes, 0))


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shared_bytes", [A100, CONSUMER])
def test_experts_where_shared_memory_is_small(
    emulator: Any, generator: torch.Generator, kind: Kind, shared_bytes: int
) -> None:
    """Two tiles of rows need more of it than one."""
    experts = [make(generator, (75, 200, 32), kind) for _ in range(3)]
    operands, sizes = _stacked(experts)
    for tokens, counts in ((24, (8, 8, 8)), (7, (7, 0, 0)), (40, (20, 0, 20))):
        x = torch.randn(tokens, 200, generator=generator).half()
        given = (x, torch.tensor(counts), operands, None, sizes)
        _check_experts(emulator.experts_linear(*given, 1, shared_bytes), x, given[1], experts, None)


def test_experts_of_other_formats(emulator: Any, generator: torch.Generator) -> None:
    """int8, fp8 and spqr: rows and operators on the CPU's tensors."""
    seed = int(torch.randint(1 << 31, (), generator=generator))
    check_operators(emulator.folder, "check_experts.py", str(seed))


@pytest.mark.parametrize("count", [31, 32, 33, 128, 1000, 1024])
def test_many_experts(emulator: Any, generator: torch.Generator, count: int) -> None:
    """With one distinct weight for each, so that no token meets a wrong one."""
    w = make(generator, (3, 8, 0), (8, None), scale_dtype=torch.float32)
    operands: list[Tensor | None] = [
        None if tensor is None else tensor.expand(count, *tensor.shape).contiguous()
        for tensor in w.operands[:3]
    ]
    assert operands[1] is not None
    scales = torch.rand(count, generator=generator) + 0.5
    operands[1] = operands[1] * scales.view(-1, 1, 1, 1, 1)
    x = torch.randn(40, 8, generator=generator).half()
    for counts in _routings(count, 40, generator):
        y = emulator.experts_linear(x, counts, (*operands, None), None, w.sizes)
        owner = torch.repeat_interleave(torch.arange(count), counts)
        expected = x.double() @ (w.values * w.scales).T
        expected[: len(owner)] *= scales[owner].unsqueeze(1)
        expected[len(owner) :] = 0
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=1e-4)


def test_a_token_that_is_no_number_reaches_its_own_output_only(
    emulator: Any, generator: torch.Generator
) -> None:
    for kind in KINDS:
        experts = [make(generator, (20, 136, 64), kind) for _ in range(3)]
        operands, sizes = _stacked(experts)
        x = torch.randn(14, 136, generator=generator).bfloat16()
        for bad in (2, 4, 5, 12):
            spoilt = x.clone()
            spoilt[bad, 135] = torch.nan
            y = emulator.experts_linear(spoilt, torch.tensor([3, 0, 9]), operands, None, sizes)
            finite = y.isfinite()
            assert finite[torch.arange(14) != bad].all()
            # Behind the sum of counts nothing is read.
            assert finite[bad].all() if bad == 12 else not finite[bad].any()


@pytest.mark.parametrize(
    "counts",
    [
        (5, 5, 5),
        (0, 11, 0),
        (-1, 4, 3),
        (-(1 << 62), 1 << 62, 1),
        (1 << 40, 1 << 40, 1 << 40),
        (0, 0, (1 << 63) - 1),
    ],
    ids=str,
)
def test_wrong_counts_write_nothing_outside(
    emulator: Any, generator: torch.Generator, counts: tuple[int, ...]
) -> None:
    """The emulator refuses every access to memory that is not x, y or the weight."""
    experts = [make(generator, (20, 72, 32), (3, "zeros")) for _ in range(3)]
    operands, sizes = _stacked(experts)
    x = torch.randn(10, 72, generator=generator).bfloat16()
    emulator.experts_linear(x, torch.tensor(counts), operands, None, sizes)
