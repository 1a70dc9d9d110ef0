"""The CUDA kernels, run on the CPU, against a float64 reference. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cuda_emulator import check_operators
from torch import Tensor

from hfq.core import bits as bit_packing
from hfq.core.codebooks import codebook
from hfq.kernels import fragments, reference

# (bits, codebook or zero points)
KINDS = (
    *((bits, extra) for bits in (2, 3, 4, 8) for extra in (None, "zeros")),
    *((4, name) for name in ("nf4", "fp4")),
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Bytes of shared memory that a thread block may have, of GPUs of compute capability 9.0, 8.0 and 8.9.
H100, A100, CONSUMER = 227 << 10, 163 << 10, 99 << 10
# Largest relative error of rounding to nearest.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FEW_TOKENS = 8  # kernels/cuda/linear.cu
# (N, K, group_size; 0: one group per row): odd numbers of rows, blocks and groups that are not full, K of one lane and of many rounds.
SHAPES = (
    (1, 8, 0),
    (17, 136, 32),
    (40, 512, 128),
    (16, 264, 64),
    (33, 200, 0),
    (5, 1096, 96),
    (48, 2056, 128),
)


@dataclass(frozen=True)
class Weight:
    """A random weight.

    Attributes:
        neutral, operands: qweight, scales, zeros, codebook as stored and in layout fragments.
        sizes: bits, group_size, in_features, out_features.
        values: code - zero or entries of the codebook `[N, K]`; scales: of each weight; both float64.
        magnitudes: bounds of what is added up in place of `values`.
    """

    neutral: tuple[Tensor | None, ...]
    operands: tuple[Tensor | None, ...]
    sizes: tuple[int, int, int, int]
    values: Tensor
    scales: Tensor
    magnitudes: Tensor

    def check(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Whether y is x W^T + bias up to the roundings that the kernel makes."""
        values = self.values
        if self.operands[3] is not None:
            values = values.to(x.dtype).double()  # the table holds numbers of that dtype
        expected = x.double() @ (values * self.scales).T
        largest = x.double().abs() @ (self.magnitudes * self.scales).T
        if bias is not None:
            expected += bias.double()
            largest += bias.double().abs()
        # Sums in float32: of each unit of 32 columns two instructions and two operations for its scale, of few tokens in one of 8 warps.
        roundings = 16 + x.shape[1] / 32 * 4 / (8 if len(x) <= FEW_TOKENS else 1)
        bound = roundings * 2.0**-24 * largest + ROUNDING[x.dtype] * expected.abs() + 2.0**-25
        assert y.dtype == x.dtype and y.shape == expected.shape
        error = (y.double() - expected).abs()
        assert (error <= bound).all(), (error / bound).max()


def make(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    kind: tuple[int, str | None],
    scale_dtype: torch.dtype = torch.float16,
) -> Weight:
    (rows, columns, group_size), (bits, extra) = shape, kind
    group_size = group_size or columns
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0, 0], codes[-1, -1] = 0, (1 << bits) - 1
    scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3).to(scale_dtype)
    by_column = torch.arange(columns) // group_size
    middle, zeros, table = float(1 << (bits - 1)), None, None
    if extra == "zeros":
        zeros = torch.rand(rows, groups, generator=generator) * ((1 << bits) - 1)
        zeros = zeros.to(scale_dtype)
        zero = zeros.double()[:, by_column]
        values = codes.double() - zero
        magnitudes = (codes.double() - middle).abs() + (middle - zero).abs()
    elif extra is None:
        values = codes.double() - middle
        magnitudes = values.abs()
    else:
        table = codebook(extra)
        values = table.double()[codes.long()]
        magnitudes = values.abs()
    neutral = (bit_packing.pack(codes, bits).unsqueeze(-1), scales, zeros, table)
    return Weight(
        neutral=neutral,
        operands=tuple(
            tensor if tensor is None or tensor is table else fragments.to_fragments(tensor, bits)
            for tensor in neutral
        ),
        sizes=(bits, group_size, columns, rows),
        values=values,
        scales=scales.double()[:, by_column],
        magnitudes=magnitudes,
    )


def _name(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture
def weight(generator: torch.Generator) -> Callable[..., Weight]:
    return lambda *arguments, **options: make(generator, *arguments, **options)


# ---- the emulator itself


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("barrier_for_some", "threads wait for others"),
        ("reads_too_far", "read outside of global memory"),
        ("writes_what_is_read_only", "write outside of global memory"),
        ("misaligned", "misaligned access to global memory"),
        ("writes_behind_shared_memory", "write behind the end of shared memory"),
    ],
)
def test_mistakes_are_seen(emulator: Any, kernel: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        emulator.self_check(kernel, torch.zeros(128, dtype=torch.int32))


def test_missing_barriers_are_seen(emulator: Any) -> None:
    x = torch.arange(128, dtype=torch.int32)
    y = emulator.self_check("neighbour_without_barrier", x)
    assert not torch.equal(y[:32], x[:32].roll(-1))


def test_copies_are_there_when_they_were_waited_for(emulator: Any) -> None:
    x = torch.arange(128, dtype=torch.int32)
    before, first, second, after = emulator.self_check("copies", x).view(32, 4).unbind(1)
    assert (before == -1).all() and (second == -1).all()
    assert torch.equal(first, x[::4]) and torch.equal(after, x[::4])


def test_matrices_and_shuffles(emulator: Any, generator: torch.Generator) -> None:
    x = torch.randint(1 << 30, (128,), generator=generator, dtype=torch.int32)
    lanes = emulator.self_check("matrices", x).view(8, 4, 4)  # g, t, matrix
    assert torch.equal(lanes, x.view(4, 8, 4).permute(1, 2, 0))
    shuffled = emulator.self_check("shuffle", x).view(32, 4)[:, 0]
    assert torch.equal(shuffled, x[torch.arange(32) ^ 5])
    x[:32] = torch.arange(32) * 4
    x[11], x[19] = 1003, 7
    first, value = emulator.self_check("shuffle_from_first", x).view(32, 4)[:, :2].unbind(1)
    assert (first == 11).all() and (value == 1003).all()
    with pytest.raises(RuntimeError, match="no lane is the first one"):
        emulator.self_check("shuffle_from_first", torch.zeros_like(x))


# ---- products


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_products(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    shape: tuple[int, int, int],
    kind: tuple[int, str | None],
) -> None:
    for dtype, tokens, scale_dtype in zip(
        HALVES, (1, 5), (torch.float16, torch.float32), strict=True
    ):
        w = weight(shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        w.check(emulator.linear(x, w.operands, None, w.sizes), x)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19])
@pytest.mark.parametrize("multiprocessors", [1 << 20, 0], ids=["one tile", "two tiles"])
def test_every_number_of_tokens(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    tokens: int,
    multiprocessors: int,
) -> None:
    w = weight((37, 328, 64), (4, "zeros"))
    x = torch.randn(tokens, 328, generator=generator).bfloat16()
    bias = torch.randn(37, generator=generator)
    y = emulator.linear(x, w.operands, bias, w.sizes, multiprocessors)
    w.check(y, x, bias)
    alone = torch.cat([emulator.linear(one, w.operands, bias, w.sizes) for one in x.split(1)])
    if tokens <= FEW_TOKENS:
        assert torch.equal(y, alone), "a token's result depends on its neighbours"
    else:
        w.check(alone, x, bias)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_two_tiles_of_rows_give_what_one_gives(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    kind: tuple[int, str | None],
) -> None:
    for rows, dtype in zip((40, 64), HALVES, strict=True):
        w = weight((rows, 456, 96), kind)
        x = torch.randn(4, 456, generator=generator).to(dtype)
        two = emulator.linear(x, w.operands, None, w.sizes, multiprocessors=0)
        w.check(two, x)
        assert torch.equal(two, emulator.linear(x, w.operands, None, w.sizes))


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    for kind, dtype in itertools.product(((4, "zeros"), (8, None)), HALVES):
        w = weight((20, 104, 32), kind, scale_dtype=scale_dtype)
        x = torch.randn(2, 104, generator=generator).to(dtype)
        bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
        w.check(emulator.linear(x, w.operands, bias, w.sizes), x, bias)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_reaches_the_outputs_of_its_token(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    kind: tuple[int, str | None],
    bad: float,
) -> None:
    w = weight((20, 136, 64), kind)
    for dtype, column, multiprocessors in zip(HALVES, (135, 3), (0, 1 << 20), strict=True):
        x = torch.randn(7, 136, generator=generator).to(dtype)
        x[4, column] = bad
        finite = emulator.linear(x, w.operands, None, w.sizes, multiprocessors).isfinite()
        assert not finite[4].any()
        assert finite[torch.arange(7) != 4].all()


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_a_scale_that_is_no_number_reaches_the_outputs_of_its_row(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    kind: tuple[int, str | None],
) -> None:
    w = weight((20, 200, 64), kind)
    scales = w.neutral[1]
    assert scales is not None
    scales[13, 3] = torch.nan
    operands = (w.operands[0], fragments.to_fragments(scales, w.sizes[0]), *w.operands[2:])
    x = torch.randn(3, 200, generator=generator).bfloat16()
    finite = emulator.linear(x, operands, None, w.sizes).isfinite()
    assert not finite[:, 13].any()
    assert finite[:, torch.arange(20) != 13].all()


def test_large_and_tiny_activations(emulator: Any, weight: Callable[..., Weight]) -> None:
    for kind in KINDS:
        w = weight((16, 64, 32), kind)
        zero = torch.zeros(1, 64, dtype=torch.bfloat16)
        assert torch.equal(emulator.linear(zero, w.operands, None, w.sizes), zero[:, :16])
        for dtype, size in ((torch.bfloat16, 1e30), (torch.float16, 1e4), (torch.float16, 6e-8)):
            # One column each, so that no product leaves float16.
            x = torch.zeros(8, 64, dtype=dtype)
            x[torch.arange(8), torch.arange(8) * 8 + 1] = size
            y = emulator.linear(x, w.operands, None, w.sizes)
            assert y.isfinite().all()
            w.check(y, x)


# ---- products with more tokens


# (multiprocessors, bytes of shared memory): blocks of many rows, of few, columns split.
DEVICES = ((1, H100), (4, CONSUMER), (12, A100), (1 << 20, H100))


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_more_tokens(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    shape: tuple[int, int, int],
    kind: tuple[int, str | None],
) -> None:
    for dtype, tokens, scale_dtype, device in zip(
        (*HALVES, *HALVES),
        (9, 33, 65, 20),
        (torch.float16, torch.float32, torch.bfloat16, torch.float16),
        DEVICES,
        strict=True,
    ):
        w = weight(shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(emulator.linear(x, w.operands, bias, w.sizes, *device), x, bias)


@pytest.mark.parametrize("tokens", [9, 16, 17, 31, 64, 100])
@pytest.mark.parametrize("kind", [(4, "zeros"), (8, None), (4, "nf4")], ids=_name)
def test_tokens_do_not_depend_on_their_neighbours(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    tokens: int,
    kind: tuple[int, str | None],
) -> None:
    w = weight((76, 648, 64), kind)
    x = torch.randn(tokens, 648, generator=generator).bfloat16()
    y = emulator.linear(x, w.operands, None, w.sizes)
    w.check(y, x)
    order = torch.randperm(tokens, generator=generator)
    assert torch.equal(emulator.linear(x[order], w.operands, None, w.sizes), y[order])


def test_every_cut(
    emulator: Any, weight: Callable[..., Weight], generator: torch.Generator
) -> None:
    """Tiles of 16, 32 and 64 tokens, with rows and columns shared out among warps and thread blocks in every way."""
    cuts = set()
    for tokens, device, rows in itertools.product((16, 32, 64), DEVICES, (40, 272)):
        w = weight((rows, 1160, 128), (8 if rows == 40 else 4, "zeros"))
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


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_among_more_tokens(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    kind: tuple[int, str | None],
    bad: float,
) -> None:
    w = weight((20, 136, 64), kind)
    for dtype, column, multiprocessors in zip(HALVES, (135, 3), (1, 1 << 20), strict=True):
        x = torch.randn(19, 136, generator=generator).to(dtype)
        x[11, column] = bad
        finite = emulator.linear(x, w.operands, None, w.sizes, multiprocessors).isfinite()
        assert not finite[11].any()
        assert finite[torch.arange(19) != 11].all()
    scales = w.neutral[1]
    assert scales is not None
    scales[13, 1] = torch.nan
    operands = (w.operands[0], fragments.to_fragments(scales, w.sizes[0]), *w.operands[2:])
    x = torch.randn(9, 136, generator=generator).bfloat16()
    finite = emulator.linear(x, operands, None, w.sizes).isfinite()
    assert not finite[:, 13].any()
    assert finite[:, torch.arange(20) != 13].all()


# ---- products with the weights of many experts


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


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_experts(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    count: int,
    kind: tuple[int, str | None],
) -> None:
    for shape, dtype, with_bias in (
        ((37, 200, 64), HALVES[0], True),
        ((16, 136, 0), HALVES[1], False),
    ):
        experts = [weight(shape, kind) for _ in range(count)]
        operands, sizes = _stacked(experts)
        bias = torch.randn(count, shape[0], generator=generator) if with_bias else None
        for tokens, multiprocessors in ((1, 0), (9, 1 << 20), (33, 0)):
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            for counts in _routings(count, tokens, generator):
                y = emulator.experts_linear(x, counts, operands, bias, sizes, multiprocessors)
                _check_experts(y, x, counts, experts, bias)


@pytest.mark.parametrize("tokens", [30, 80, 260])
@pytest.mark.parametrize("kind", [(4, "zeros"), (3, None), (8, None), (4, "nf4")], ids=_name)
def test_experts_with_many_tokens(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    kind: tuple[int, str | None],
    tokens: int,
) -> None:
    """In runs of 16, 32 and 64; some experts have none, or fewer than others."""
    experts = [weight((37, 200, 64), kind) for _ in range(3)]
    operands, sizes = _stacked(experts)
    bias = torch.randn(3, 37, generator=generator)
    x = torch.randn(tokens, 200, generator=generator).bfloat16()
    for counts in _routings(3, tokens, generator):
        y = emulator.experts_linear(x, counts, operands, bias, sizes, 1)
        _check_experts(y, x, counts, experts, bias)


@pytest.mark.parametrize("tokens", range(1, 41))
def test_experts_with_every_number_of_tokens(
    emulator: Any, weight: Callable[..., Weight], generator: torch.Generator, tokens: int
) -> None:
    experts = [weight((21, 72, 32), (4, None)) for _ in range(3)]
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


@pytest.mark.parametrize("count", [31, 32, 33, 128, 1000, 1024])
def test_many_experts(
    emulator: Any, weight: Callable[..., Weight], generator: torch.Generator, count: int
) -> None:
    """With one distinct weight for each, so that no token meets a wrong one."""
    w = weight((3, 8, 0), (8, None), scale_dtype=torch.float32)
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
    emulator: Any, weight: Callable[..., Weight], generator: torch.Generator
) -> None:
    for kind in KINDS:
        experts = [weight((20, 136, 64), kind) for _ in range(3)]
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
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    counts: tuple[int, ...],
) -> None:
    """The emulator refuses every access to memory that is not x, y or the weight."""
    experts = [weight((20, 72, 32), (3, "zeros")) for _ in range(3)]
    operands, sizes = _stacked(experts)
    x = torch.randn(10, 72, generator=generator).bfloat16()
    emulator.experts_linear(x, torch.tensor(counts), operands, None, sizes)


# ---- rows


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_dequantize_is_the_reference(
    emulator: Any,
    weight: Callable[..., Weight],
    shape: tuple[int, int, int],
    kind: tuple[int, str | None],
) -> None:
    for scale_dtype, dtype in zip(
        FLOATS, (torch.bfloat16, torch.float16, torch.float32), strict=True
    ):
        w = weight(shape, kind, scale_dtype=scale_dtype)
        expected = reference.dequantize(*w.neutral, None, *w.sizes[:3], dtype)  # type: ignore[arg-type]
        assert torch.equal(emulator.unpack(None, w.operands, w.sizes, dtype), expected)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_lookup_gives_rows_of_the_dequantized_weight(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    kind: tuple[int, str | None],
) -> None:
    w = weight((45, 264, 32), kind)
    for dtype, count in zip(FLOATS, (1, 16, 33), strict=True):
        index = torch.randint(45, (count,), generator=generator)
        expected = reference.dequantize(*w.neutral, None, *w.sizes[:3], dtype)  # type: ignore[arg-type]
        assert torch.equal(emulator.unpack(index, w.operands, w.sizes, dtype), expected[index])
    outside = torch.tensor([3, -1, 45, 44])
    rows = emulator.unpack(outside, w.operands, w.sizes, torch.float32)
    assert rows.isnan().all(1).tolist() == [False, True, True, False]


# ---- operators


def test_operators_and_modules(emulator: Any) -> None:
    """The binding, the row and modules with it: on CPU tensors, in a process whose CPU is the emulated GPU."""
    check_operators(emulator.folder, "check_operators.py")


# ---- all of them


def _every_case() -> Iterator[Any]:
    for kind, group_size, dtype in itertools.product(KINDS, (32, 64, 96, 128, 160, 0), HALVES):
        yield pytest.param(kind, group_size, dtype, id=f"{_name(kind)}-{group_size}-{dtype}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group_size", "dtype"), list(_every_case()))
def test_every_combination(
    emulator: Any,
    weight: Callable[..., Weight],
    generator: torch.Generator,
    kind: tuple[int, str | None],
    group_size: int,
    dtype: torch.dtype,
) -> None:
    for (rows, columns), tokens, multiprocessors in itertools.product(
        ((1, 40), (17, 1000), (40, 328), (64, 4096)), (1, 2, 8, 11, 33), (0, 1 << 20)
    ):
        w = weight((rows, columns, group_size), kind)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator) if tokens % 2 else None
        w.check(emulator.linear(x, w.operands, bias, w.sizes, multiprocessors), x, bias)
