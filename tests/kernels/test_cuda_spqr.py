"""The CUDA kernels of format ``spqr`` on a GPU: operators and modules against float64 and the PyTorch reference; CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, Shape
from on_gpu import captured, check_module, quantized
from spqr_weights import BITS, random_weight
from torch import Tensor

from hfq.core.spec import SpqrSpec
from hfq.core.weight import SpqrGrid
from hfq.kernels import native
from hfq.kernels.neutral_spqr import operands, sizes

pytestmark = pytest.mark.gpu

# (N, K, group_size; 0: one group per row): odd shapes, and those of models.
SHAPES = (
    (1, 8, 0),
    (17, 136, 16),
    (33, 200, 0),
    (5, 1096, 48),
    (150, 2056, 32),
    (1024, 4096, 16),
    (4096, 14336, 16),
    (4096, 4096, 128),
)


@pytest.fixture
def make(cuda: torch.device, generator: torch.Generator) -> Callable[..., Any]:
    """`random_weight` of spqr_weights.py, what kernels read on the GPU."""
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")

    def there(grid: SpqrGrid) -> SpqrGrid:
        tensors = {f.name: getattr(grid, f.name) for f in fields(grid)}
        return replace(
            grid, **{name: t.to(cuda) for name, t in tensors.items() if isinstance(t, Tensor)}
        )

    def make(shape: Shape, **options: Any) -> Any:
        weight = random_weight(generator, shape, **options)
        return replace(weight, ready=there(weight.ready))

    return make


def linear(x: Tensor, grid: SpqrGrid, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.hfq.cuda_spqr_linear(
        x, *operands(grid), bias, *sizes(grid), grid.out_features
    )
    return y


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(
    make: Callable[..., Any],
    generator: torch.Generator,
    cuda: torch.device,
    shape: Shape,
    bits: int,
) -> None:
    rows, columns, _ = shape
    for dtype, stat_dtype, stat_bits in zip(HALVES, FLOATS, (3, 6), strict=False):
        w = make(shape, bits=bits, stats=(stat_bits, 64), dtype=stat_dtype)
        for tokens in (0, 1, 3, 8, 19, 40, 150):
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            bias = torch.randn(rows, generator=generator) if tokens % 2 else None
            bias_there = None if bias is None else bias.to(cuda)
            y = linear(x.to(cuda), w.ready, bias_there)
            w.check(y.cpu(), x, bias)
            assert torch.equal(y, linear(x.to(cuda), w.ready, bias_there)), "sums are in one order"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 64])
def test_a_token_gives_the_same_beside_others(
    make: Callable[..., Any],
    generator: torch.Generator,
    cuda: torch.device,
    bits: int,
    group_size: int,
) -> None:
    """One token, several, and several with two tiles at once, which takes many rows."""
    for rows, tokens in ((80, 7), (33000, 2), (33000, 8)):
        w = make((rows, 520, group_size), bits=bits)
        x = torch.randn(tokens, 520, generator=generator).to(torch.bfloat16)
        y = linear(x.to(cuda), w.ready)
        w.check(y.cpu(), x)
        alone = [linear(one, w.ready) for one in x.to(cuda).split(1)]
        assert torch.equal(y, torch.cat(alone))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_dequantize_and_lookup_are_the_reference(
    make: Callable[..., Any],
    generator: torch.Generator,
    cuda: torch.device,
    shape: Shape,
    bits: int,
) -> None:
    rows = shape[0]
    for stat_dtype, stat_bits in zip(FLOATS, (3, 4, 8), strict=True):
        w = make(shape, bits=bits, stats=(stat_bits, 64), dtype=stat_dtype)
        arguments = (*operands(w.ready), *sizes(w.ready), rows)
        for dtype in FLOATS:
            expected = w.reference(dtype)
            dense = torch.ops.hfq.cuda_spqr_dequantize(*arguments, dtype)
            assert torch.equal(dense.cpu(), expected)
            index = torch.randint(rows, (35,), generator=generator)
            found = torch.ops.hfq.cuda_spqr_lookup(index.to(cuda), *arguments, dtype)
            assert torch.equal(found.cpu(), expected[index])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_the_outputs_of_its_token(
    make: Callable[..., Any], generator: torch.Generator, cuda: torch.device, bits: int, bad: float
) -> None:
    w = make((20, 136, 16), bits=bits)
    for dtype in HALVES:
        x = torch.randn(7, 136, generator=generator).to(cuda, dtype)
        x[4, 135] = bad
        finite = linear(x, w.ready).isfinite()
        assert not finite[4].any()
        assert finite[torch.arange(7) != 4].all()


def test_wrong_indices_do_not_leave_the_buffers(
    make: Callable[..., Any], cuda: torch.device
) -> None:
    grid = make((40, 104, 16)).ready
    wild = torch.tensor([-5, 32767, 104, -32768], dtype=torch.int16, device=cuda)
    for changed in (
        {"columns": wild.repeat(len(grid.columns))[: len(grid.columns)]},
        {"offsets": torch.full_like(grid.offsets, 2**31 - 1)},
        {"offsets": torch.full_like(grid.offsets, -(2**31))},
    ):
        x = torch.ones(3, 104, dtype=torch.bfloat16, device=cuda)
        assert linear(x, replace(grid, **changed)).isfinite().all()
    torch.cuda.synchronize()


def test_opcheck(make: Callable[..., Any], generator: torch.Generator, cuda: torch.device) -> None:
    check, hfq = torch.library.opcheck, torch.ops.hfq
    for bits in BITS:
        grid = make((40, 136, 16), bits=bits).ready
        ready, numbers = operands(grid), (*sizes(grid), 40)
        x = torch.randn(3, 136, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
        bias = torch.randn(40, generator=generator).to(cuda).requires_grad_()
        check(hfq.cuda_spqr_dequantize.default, (*ready, *numbers, torch.bfloat16))
        index = torch.tensor([3, 39], device=cuda)
        check(hfq.cuda_spqr_lookup.default, (index, *ready, *numbers, torch.float16))
        check(hfq.cuda_spqr_linear.default, (x, *ready, bias, *numbers))
        check(hfq.cuda_spqr_linear.default, (x.detach().repeat(5, 1), *ready, None, *numbers))
        check(hfq.cuda_spqr_linear_dequantized.default, (x, *ready, None, *numbers))
        grad = torch.randn(3, 40, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
        check(hfq.cuda_spqr_linear_gradient.default, (grad, *ready, *numbers))


@pytest.mark.parametrize("tokens", [2, 50])
def test_in_a_cuda_graph(
    make: Callable[..., Any], generator: torch.Generator, cuda: torch.device, tokens: int
) -> None:
    grid = make((1024, 4096, 16)).ready
    x = torch.randn(tokens, 4096, generator=generator).to(cuda, torch.bfloat16)
    graph, y = captured(lambda: linear(x, grid))
    for _ in range(2):
        x.copy_(torch.randn(tokens, 4096, generator=generator))
        graph.replay()
        assert torch.equal(y, linear(x, grid))


@pytest.mark.parametrize("bits", BITS)
def test_modules(generator: torch.Generator, cuda: torch.device, bits: int) -> None:
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")
    spec = SpqrSpec(bits=bits, stat_bits=bits + 1, outliers=0.02)
    check_module(quantized(264, 72, "spqr", spec, generator), "cuda_spqr", cuda, generator)
