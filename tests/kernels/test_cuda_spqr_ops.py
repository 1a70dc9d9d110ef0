"""Layouts of format ``spqr`` for CUDA, the operators on them and their kernel row, on the CPU: what a GPU computes is in test_cuda_spqr.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spqr_weights import prepared
from torch import Tensor

from hfq.core import affine
from hfq.core import bits as bit_packing
from hfq.core.spec import SpqrSpec
from hfq.core.weight import SpqrGrid
from hfq.formats import FORMATS
from hfq.kernels import cuda_spqr_ops, fragments, spqr_fragments
from hfq.kernels.cuda_spqr import CudaSpqr
from hfq.kernels.neutral_spqr import NeutralSpqr, operands, sizes
from hfq.kernels.row import Problem

N, K = 40, 136
ROW = CudaSpqr()
SPECS = (
    SpqrSpec(outliers=0.03),
    SpqrSpec(bits=2, group_size=32, stat_group_size=16, outliers=0.1, scale_dtype="bfloat16"),
    SpqrSpec(bits=4, group_size=64, stat_bits=5, stat_group_size=32, scale_dtype="float32"),
    SpqrSpec(bits=4, group_size=-1, stat_bits=8, stat_group_size=256, outliers=0),
)


def stored(weight: Tensor, spec: SpqrSpec) -> SpqrGrid:
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    packed_format = FORMATS.get("spqr")
    grid = packed_format.grid(packed_format.pack(quantized), spec, *weight.shape)
    assert isinstance(grid, SpqrGrid)
    return grid


@pytest.fixture(params=SPECS, ids=str)
def grid(request: pytest.FixtureRequest, random_weight: Callable[..., Tensor]) -> SpqrGrid:
    """A weight `[N, K]` as it is stored."""
    return stored(random_weight(N, K), request.param)


def arguments(grid: SpqrGrid, *between: object) -> tuple[object, ...]:
    return (*operands(grid), *between, *sizes(grid), grid.out_features)


def dense(grid: SpqrGrid, dtype: torch.dtype = torch.float32) -> Tensor:
    return NeutralSpqr().dequantize(grid, dtype)


# ---- layouts


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 128), (17, 136), (33, 264)])
def test_codes_round_trip(
    generator: torch.Generator, bits: int, lead: tuple[int, ...], rows: int, columns: int
) -> None:
    shape = (*lead, rows, columns * bits // 8, 1)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tiles = fragments.to_fragments(codes, bits, halves=True)
    assert tiles.is_contiguous()
    assert tiles.shape == fragments.to_fragments(codes, bits).shape
    assert torch.equal(fragments.from_fragments(tiles, shape, bits, halves=True), codes)


def test_a_matrix_instruction_has_the_columns_of_one_group(generator: torch.Generator) -> None:
    """4 bits: word 2 unit + j of a lane belongs to instruction j."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    codes[:, 16:32] = 15
    tiles = fragments.to_fragments(bit_packing.pack(codes, 4).unsqueeze(-1), 4, halves=True)
    words = tiles[0, 0].view(32, 4, 4)
    assert (words[:, 1] == 255).all()
    assert (words[:, [0, 2, 3]] == 0).all()


@pytest.mark.parametrize("stat_bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (16, 8), (17, 9), (33, 5)])
def test_codes_of_scales_round_trip(
    generator: torch.Generator, stat_bits: int, lead: tuple[int, ...], rows: int, groups: int
) -> None:
    codes = torch.randint(
        1 << stat_bits, (*lead, rows, groups, 2), generator=generator, dtype=torch.uint8
    )
    neutral = bit_packing.pack(codes.flatten(-2), stat_bits).unsqueeze(-1)
    pairs = spqr_fragments.to_stat_pairs(neutral, stat_bits)
    room = spqr_fragments.stat_groups(neutral.shape[-2], stat_bits)
    assert groups <= room <= groups + 1
    assert pairs.shape == (*lead, -(-rows // 16), room, 8, 2 if stat_bits <= 4 else 4)
    assert pairs.is_contiguous()
    n = rows - 1
    pair = pairs[..., n // 16, :groups, n % 8, :]
    if stat_bits <= 4:
        one = pair[..., n // 8 % 2]
        found = torch.stack([one & 15, one >> 4], -1)
    else:
        found = pair.unflatten(-1, (2, 2))[..., n // 8 % 2, :]
    assert torch.equal(found, codes[..., n, :, :])
    back = spqr_fragments.from_stat_pairs(pairs, tuple(neutral.shape), stat_bits)
    assert torch.equal(back, neutral)


# ---- operators


def test_dequantize_is_that_of_the_stored_weight(grid: SpqrGrid) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.ops.hfq.cuda_spqr_dequantize(*arguments(prepared(grid)), dtype)
        assert torch.equal(weight, dense(grid, dtype))


@pytest.mark.parametrize("chunk", [1, 1 << 30])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
    grid: SpqrGrid,
    with_bias: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr(cuda_spqr_ops, "CHUNK", chunk)
    ready, weight = prepared(grid), dense(grid)
    for shape in ((5,), (2, 3), (0,)):
        x = torch.randn(*shape, K, generator=generator, requires_grad=True)
        bias = torch.randn(N, generator=generator, requires_grad=True) if with_bias else None
        leaves = [x, *([] if bias is None else [bias])]
        grad = torch.randn(*shape, N, generator=generator)
        expected = torch.nn.functional.linear(x, weight, bias)
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for name in ("cuda_spqr_linear", "cuda_spqr_linear_dequantized"):
            y = getattr(torch.ops.hfq, name)(x, *arguments(ready, bias))
            torch.testing.assert_close(y, expected)
            for one, other in zip(
                torch.autograd.grad(y, leaves, grad), expected_grads, strict=True
            ):
                torch.testing.assert_close(one, other)


def test_gradients_of_gradients(generator: torch.Generator, grid: SpqrGrid) -> None:
    ready = prepared(grid)
    grad = torch.randn(1, N, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda grad: torch.ops.hfq.cuda_spqr_linear_gradient(grad, *arguments(ready)), grad
    )


def test_opcheck(generator: torch.Generator, grid: SpqrGrid) -> None:
    ready = prepared(grid)
    x = torch.randn(3, K, generator=generator, requires_grad=True)
    bias = torch.randn(N, generator=generator, requires_grad=True)
    check, hfq = torch.library.opcheck, torch.ops.hfq
    check(hfq.cuda_spqr_dequantize.default, (*arguments(ready), torch.bfloat16))
    index = torch.randint(N, (5,), generator=generator)
    check(hfq.cuda_spqr_lookup.default, (index, *arguments(ready), torch.float16))
    check(hfq.cuda_spqr_linear.default, (x, *arguments(ready, bias)))
    check(hfq.cuda_spqr_linear_dequantized.default, (x, *arguments(ready, None)))
    grad = torch.randn(3, N, generator=generator, requires_grad=True)
    check(hfq.cuda_spqr_linear_gradient.default, (grad, *arguments(ready)))


def test_every_operator_has_a_schema_and_a_line_in_the_docstring() -> None:
    assert cuda_spqr_ops.__doc__ is not None
    for name in ("dequantize", "lookup", "linear", "linear_dequantized", "linear_gradient"):
        schema = getattr(torch.ops.hfq, f"cuda_spqr_{name}").default._schema
        assert str(schema).startswith(f"hfq::cuda_spqr_{name}(")
        assert f"    cuda_spqr_{name} " in cuda_spqr_ops.__doc__


# ---- the kernel row


def test_row(generator: torch.Generator, grid: SpqrGrid) -> None:
    ready = prepared(grid)
    assert torch.equal(ROW.dequantize(ready, torch.float64), dense(grid, torch.float64))
    index = torch.randint(N, (5,), generator=generator)
    assert torch.equal(ROW.lookup(ready, index, torch.bfloat16), dense(grid, torch.bfloat16)[index])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for shape in ((1,), (2, 20), (2, 0), ()):
            x = torch.randn(*shape, K, generator=generator).to(dtype)
            expected = torch.nn.functional.linear(x, dense(grid, dtype))
            y = ROW.linear(x, ready, None, False)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected)


def test_row_restores_what_itprepared(grid: SpqrGrid) -> None:
    ready = prepared(grid)
    codes = ROW.restore(ready.qweight, tuple(grid.qweight.shape), grid.bits)
    assert ready.qweight.dim() != grid.qweight.dim() and torch.equal(codes, grid.qweight)
    shape = tuple(grid.stat_codes.shape)
    stats = ROW.restore_stats(ready.stat_codes, shape, grid.stat_bits)
    assert ready.stat_codes.dim() != len(shape) and torch.equal(stats, grid.stat_codes)
    assert ROW.prepare(grid.stats, grid.bits) is grid.stats


def test_experts(generator: torch.Generator, random_weight: Callable[..., Tensor]) -> None:
    experts = [stored(random_weight(N, K), SPECS[0]) for _ in range(3)]
    names = ("qweight", "stat_codes", "stats", "offsets", "columns", "values")
    stack = {name: torch.stack([getattr(one, name) for one in experts]) for name in names}
    ready = prepared(replace(experts[0], **stack))  # type: ignore[arg-type]
    x = torch.randn(5, K, generator=generator)
    y = ROW.experts(x, torch.tensor([3, 0, 2]), ready, None, False)
    parts = [x[:3] @ dense(experts[0]).T, x[3:] @ dense(experts[2]).T]
    torch.testing.assert_close(y, torch.cat(parts))


def test_reasons_to_refuse(
    machine: Callable[..., None], random_weight: Callable[..., Tensor]
) -> None:
    problem = Problem.of(stored(random_weight(N, K), SPECS[0]))
    assert ROW.reject(problem) == "runs on cuda, the weight is on cpu"
    problem = replace(problem, device="cuda")
    for changes, words in (
        ({"bits": 5}, "takes 2, 3 and 4 bits, not 5"),
        ({"in_features": 100}, "multiples of 8"),
        ({"in_features": 1 << 19}, "below 524288"),
        ({"group_size": 8}, "multiples of 16 columns, those of one matrix instruction, not 8"),
        ({"stat_group_size": 8}, "stat_group_size in multiples of 16, not 8"),
    ):
        reason = ROW.reject(replace(problem, **changes))  # type: ignore[arg-type]
        assert reason is not None and words in reason, changes
    machine((8, 0))
    assert ROW.reject(problem) is None
    assert ROW.reject(replace(problem, in_features=40, group_size=40)) is None
