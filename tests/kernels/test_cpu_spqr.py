"""The CPU kernels of format ``spqr`` against the PyTorch reference, for every instruction set that this machine has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.spec import SpqrSpec
from hfq.core.weight import SpqrGrid
from hfq.formats import FORMATS
from hfq.kernels import dispatch, native
from hfq.kernels.cpu_spqr import MAX_DIRECT_TOKENS, CpuSpqr
from hfq.kernels.neutral_spqr import NeutralSpqr, operands, sizes
from hfq.kernels.row import Problem

pytestmark = pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels")

MakeWeight = Callable[..., Tensor]

ISAS = native.load().isas if native.load().cpu else ()
ROW, NEUTRAL, FORMAT = CpuSpqr(), NeutralSpqr(), FORMATS.get("spqr")

# (N, K): single, short blocks and units, codes that end inside of words, several blocks that share stats.
SHAPES = [(1, 1), (16, 32), (17, 33), (150, 260)]

SPECS = [
    SpqrSpec(outliers=0.03),
    SpqrSpec(bits=2, group_size=8, stat_group_size=16, outliers=0.1, scale_dtype="bfloat16"),
    SpqrSpec(bits=4, group_size=64, stat_bits=5, stat_group_size=32, scale_dtype="float32"),
    SpqrSpec(bits=3, group_size=12, stat_bits=8, outliers=0),
    SpqrSpec(bits=4, group_size=-1, stat_group_size=256, outliers=0.05),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


def packed(weight: Tensor, spec: SpqrSpec) -> SpqrGrid:
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    grid = FORMAT.grid(FORMAT.pack(quantized), spec, *weight.shape)
    assert isinstance(grid, SpqrGrid)
    return grid


def prepared(grid: SpqrGrid) -> SpqrGrid:
    return replace(
        grid,
        qweight=ROW.prepare(grid.qweight, grid.bits),
        stat_codes=ROW.prepare(grid.stat_codes, grid.bits),
    )


def direct(x: Tensor, grid: SpqrGrid, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.hfq.cpu_spqr_linear(
        x, *operands(grid), bias, *sizes(grid), grid.out_features
    )
    return y


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantize_is_the_reference(spec: SpqrSpec, isa: str, random_weight: MakeWeight) -> None:
    for shape in SHAPES:
        grid = packed(random_weight(*shape), spec)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            expected = NEUTRAL.dequantize(grid, dtype)
            found = ROW.dequantize(prepared(grid), dtype)
            assert found.dtype == dtype and bool(found.isfinite().all())
            if spec.scale_dtype == "float32":  # a fused multiply-add rounds decoded scales once
                torch.testing.assert_close(found, expected)
            else:
                assert torch.equal(found, expected), shape


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_products_are_those_of_the_dequantized_weight(
    spec: SpqrSpec, isa: str, random_weight: MakeWeight, generator: torch.Generator
) -> None:
    for with_bias, shape in zip(itertools.cycle((False, True)), SHAPES, strict=False):
        rows, columns = shape
        grid = packed(random_weight(rows, columns), spec)
        weight, ready = NEUTRAL.dequantize(grid, torch.float64), prepared(grid)
        bias = torch.randn(rows, generator=generator) if with_bias else None
        for tokens in (0, 1, 2, 3, 4, 8, 17):
            x = torch.randn(tokens, columns, generator=generator)
            expected = torch.nn.functional.linear(
                x.double(), weight, None if bias is None else bias.double()
            )
            torch.testing.assert_close(
                direct(x, ready, bias), expected.float(), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_activations_are_computed_in_float32(
    dtype: torch.dtype, isa: str, random_weight: MakeWeight, generator: torch.Generator
) -> None:
    grid = packed(random_weight(70, 300), SPECS[0])
    x = torch.randn(3, 300, generator=generator).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype)
    expected = direct(x.float(), prepared(grid), bias.float())
    torch.testing.assert_close(direct(x, prepared(grid), bias), expected.to(dtype))


@pytest.mark.parametrize("tokens", [1, MAX_DIRECT_TOKENS, MAX_DIRECT_TOKENS + 1, 70])
def test_the_row_takes_any_number_of_tokens(
    tokens: int, random_weight: MakeWeight, generator: torch.Generator
) -> None:
    grid = packed(random_weight(40, 100), SPECS[0])
    weight = NEUTRAL.dequantize(grid, torch.float64)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, tokens, 100, generator=generator).to(dtype)[:, : max(tokens // 2, 1)]
        y = ROW.linear(x, prepared(grid), None, int8_activations=True)
        torch.testing.assert_close(y, (x.double() @ weight.T).to(dtype), rtol=1e-4, atol=1e-5)


def test_not_a_number_passes(isa: str, random_weight: MakeWeight) -> None:
    grid = prepared(packed(random_weight(20, 64), SPECS[0]))
    x = torch.zeros(2, 64)
    x[1, 40] = torch.nan
    y = direct(x, grid, None)
    assert bool((y[0] == 0).all()) and bool(y[1].isnan().all())


def test_layouts_are_restored_bit_by_bit(random_weight: MakeWeight) -> None:
    for spec, shape in itertools.product(SPECS, SHAPES):
        grid = packed(random_weight(*shape), spec)
        for neutral in (grid.qweight, grid.stat_codes, grid.stats, grid.columns):
            ready = ROW.prepare(neutral, grid.bits)
            if ready.dim() != neutral.dim():
                assert torch.equal(ROW.restore(ready, tuple(neutral.shape), grid.bits), neutral)
            else:
                assert ready is neutral


def test_picked_rows(random_weight: MakeWeight) -> None:
    index = torch.tensor([5, 0, 39, 5, 16])
    for spec in SPECS:
        grid = packed(random_weight(40, 100), spec)
        expected = NEUTRAL.dequantize(grid, torch.float32)[index]
        for row, ready in ((ROW, prepared(grid)), (NEUTRAL, grid)):
            assert torch.equal(row.lookup(ready, index, torch.float32), expected)
        assert ROW.lookup(prepared(grid), index[:0], torch.float32).shape == (0, 100)


# ---- what it refuses


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"bits": 5}, "takes 2, 3 and 4 bits, not 5"),
        ({"group_size": 6}, "takes groups in multiples of 4 columns, not 6"),
        ({"stat_group_size": 8}, "takes stat_group_size in multiples of 16, not 8"),
        ({"device": "cuda"}, "runs on cpu, the weight is on cuda"),
    ],
)
def test_it_says_what_it_does_not_take(
    changed: dict[str, Any], reason: str, random_weight: MakeWeight
) -> None:
    problem = Problem.of(packed(random_weight(16, 64), SPECS[0]))
    assert dispatch.select(problem).row.name == "cpu_spqr"
    choice = dispatch.select(replace(problem, **changed))
    assert choice.row.name != "cpu_spqr" and choice.refused[0] == ("cpu_spqr", reason)


def test_wrong_indices_do_not_leave_the_buffers(isa: str, random_weight: MakeWeight) -> None:
    """Checkpoints are checked before; who calls the operator with others gets numbers, not a crash."""
    grid = prepared(packed(random_weight(40, 100), SPECS[0]))
    wild = torch.tensor([-5, 32767, 100, -32768], dtype=torch.int16).repeat(30)
    for changed in (
        {"columns": wild[: len(grid.columns)]},
        {"offsets": torch.full_like(grid.offsets, 2**31 - 1)},
        {"offsets": torch.full_like(grid.offsets, -(2**31))},
        {"offsets": grid.offsets.flip(0).contiguous()},
    ):
        damaged = replace(grid, **changed)
        assert direct(torch.ones(3, 100), damaged, None).shape == (3, 40)
        assert ROW.dequantize(damaged, torch.bfloat16).shape == (40, 100)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qweight": torch.zeros(3, 9, 16, 4, dtype=torch.uint8)}, "qweight must be of shape"),
        ({"stat_codes": torch.zeros(3, 9, 16, 4, dtype=torch.uint8)}, "stat_codes must be of"),
        ({"stats": torch.zeros(1, 7, 3)}, "stats must be of shape"),
        ({"offsets": torch.zeros(40, dtype=torch.int32)}, "offsets must be of shape"),
        ({"offsets": torch.zeros(41)}, "offsets must be int32"),
        ({"columns": torch.zeros(5, dtype=torch.int64)}, "columns must be int16 or int32"),
        ({"values": torch.zeros(5)}, "values must be of the same dtype as stats"),
        ({"stat_group_size": 8}, "stat_group_size must be a multiple of 16"),
        ({"group_size": 6}, "group_size must be a multiple of 4"),
        ({"bits": 5}, "bits must be 2, 3 or 4"),
        ({"stat_bits": 9}, "stat_bits must be 2 to 8"),
    ],
)
def test_operators_check_their_arguments(
    changed: dict[str, Any], message: str, random_weight: MakeWeight
) -> None:
    grid = replace(prepared(packed(random_weight(40, 100), SPECS[0])), **changed)
    with pytest.raises(RuntimeError, match=message):
        direct(torch.ones(1, 100), grid, None)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hfq.cpu_spqr_dequantize(
            *operands(grid), *sizes(grid), grid.out_features, torch.float32
        )


# ---- as operators of PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, random_weight: MakeWeight, generator: torch.Generator) -> None:
    grid = packed(random_weight(24, 37), SPECS[0])
    ready, ops = prepared(grid), torch.ops.hfq
    x = torch.randn(3, 37, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(24, generator=generator, requires_grad=True)
    native_sizes = (*sizes(ready), 24)
    torch.library.opcheck(ops.spqr_dequantize.default, (*operands(grid), *sizes(grid), dtype))
    torch.library.opcheck(ops.spqr_linear.default, (x, *operands(grid), bias, *sizes(grid)))
    torch.library.opcheck(ops.cpu_spqr_dequantize.default, (*operands(ready), *native_sizes, dtype))
    for operator in (ops.cpu_spqr_linear, ops.cpu_spqr_linear_dequantized):
        torch.library.opcheck(operator.default, (x, *operands(ready), bias, *native_sizes))


@pytest.mark.parametrize("tokens", [3, MAX_DIRECT_TOKENS + 3])
def test_gradients_are_those_of_the_dequantized_weight(
    tokens: int, random_weight: MakeWeight, generator: torch.Generator
) -> None:
    grid = packed(random_weight(24, 37), SPECS[0])
    weight = NEUTRAL.dequantize(grid, torch.float32)
    x = torch.randn(tokens, 37, generator=generator, requires_grad=True)
    bias = torch.randn(24, generator=generator, requires_grad=True)
    grad = torch.randn(tokens, 24, generator=generator)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, bias), grad)
    for row, ready in ((ROW, prepared(grid)), (NEUTRAL, grid)):
        y = row.linear(x, ready, bias, int8_activations=False)
        for ours, theirs in zip(torch.autograd.grad(y, (x, bias), grad), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
