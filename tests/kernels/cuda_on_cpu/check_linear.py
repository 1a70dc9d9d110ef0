"""Run by test_cuda_linear_emulated.py in a process of its own: the operators ``hfq::cuda_*`` on layout fragments on the CPU are those of CUDA,
emulated. See operators_on_cpu.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
from operators_on_cpu import (
    HALF,
    check_modules,
    check_table,
    emulated,
    linear_module,
    moved,
    on_cpu,
    prepare,
    refused,
    strided,
)
from torch import Tensor

from hfq.core.spec import CodebookSpec, IntSpec
from hfq.core.weight import PackedGrid
from hfq.kernels import cuda

N, K = 48, 136
ROW = on_cpu(cuda.CudaFragments)
SPECS = (
    ("int", IntSpec(bits=2, group_size=32, sym=False)),
    ("int", IntSpec(bits=3, group_size=64)),
    ("int", IntSpec(bits=4, group_size=128, scale_dtype="bfloat16")),
    ("int", IntSpec(bits=8, group_size=-1, sym=False, scale_dtype="float32")),
    ("nf4", CodebookSpec(group_size=64, double_quant=True)),
)


def prepared_grid(sym: bool = False) -> PackedGrid:
    """4 bits in groups of 32."""
    grid = prepare(linear_module(N, K, "int", IntSpec(group_size=32, sym=sym)), ROW)
    assert isinstance(grid, PackedGrid)
    return grid


SIZES = (4, 32, K, N)


def check_arguments() -> None:
    grid = prepared_grid()
    x = moved(torch.randn(2, K, dtype=HALF), 1)

    def linear(
        x: Tensor = x,
        sizes: tuple[int, ...] = SIZES,
        bias: Tensor | None = None,
        table: Tensor | None = None,
        **changes: Tensor,
    ) -> Tensor:
        g = replace(grid, **changes)
        y: Tensor = torch.ops.hfq.cuda_linear(x, g.qweight, g.scales, g.zeros, table, bias, *sizes)
        return y

    assert torch.equal(linear(), linear(x.clone())), "activations that begin anywhere"
    assert grid.zeros is not None
    refused("bits must be 2, 3, 4 or 8, got 5", linear, sizes=(5, 32, K, N))
    refused("in_features must be a multiple of 8", linear, sizes=(4, 32, 132, N))
    refused("in_features must be a multiple of 8", linear, sizes=(4, 32, 1 << 20, N))
    refused("out_features must be between", linear, sizes=(4, 32, K, 0))
    refused("group_size must be a multiple of 32", linear, sizes=(4, 48, K, N))
    refused("qweight must be uint8", linear, qweight=grid.qweight.char())
    refused("qweight must be of shape", linear, qweight=grid.qweight[1:])
    refused("qweight must be contiguous", linear, qweight=strided(grid.qweight))
    refused("scales must be of shape", linear, scales=grid.scales[..., 1:])
    refused("scales must be float32, float16", linear, scales=grid.scales.double())
    refused("zeros must be of the same dtype", linear, zeros=grid.zeros.float())
    refused("a codebook takes 4 bits, or 8 for E4M3, and no zeros", linear, table=torch.zeros(16))
    refused("x must be float16 or bfloat16", linear, x.float())
    refused("x must be of shape", linear, x[:, 8:])
    refused("x must be of shape", linear, x[None])
    refused("x must be contiguous", linear, strided(x))
    refused("bias must be of shape", linear, bias=torch.zeros(N + 1))
    refused("bias must be float32", linear, bias=torch.zeros(N).int())
    lookup = torch.ops.hfq.cuda_lookup
    operands = (grid.qweight, grid.scales, grid.zeros, None, *SIZES)
    refused("index must be int64 of shape", lookup, torch.zeros(1).int(), *operands, torch.float16)
    refused("dtype must be float32", lookup, torch.zeros(1).long(), *operands, torch.int8)


def check_pairs() -> None:
    """Those of compute capability 9.0 get the memory that x is put in order in, from wherever it begins."""
    grid = prepared_grid()
    x = moved(torch.randn(120, K, dtype=HALF), 1)
    arguments = (grid.qweight, grid.scales, grid.zeros, None, None, *SIZES)
    os.environ["HFQ_CUDA_WGMMA"] = "pairs"
    emulated.set_compute_capability(90)
    emulated.set_multiprocessors(2)
    y = torch.ops.hfq.cuda_linear(x, *arguments)
    os.environ["HFQ_CUDA_WGMMA"] = "0"
    usual = torch.ops.hfq.cuda_linear(x, *arguments)
    emulated.set_compute_capability(80)
    emulated.set_multiprocessors(1)
    del os.environ["HFQ_CUDA_WGMMA"]
    torch.testing.assert_close(y, torch.ops.hfq.cuda_linear_dequantized(x, *arguments))
    assert not torch.equal(y, usual), "pairs round weights: they were not taken"


def check_experts() -> None:
    grids = [prepared_grid() for _ in range(3)]
    names = ("qweight", "scales", "zeros")
    stack = {name: torch.stack([getattr(grid, name) for grid in grids]) for name in names}
    grid = replace(grids[0], **stack)  # type: ignore[arg-type]
    bias = torch.randn(3, N).half()
    counts = torch.tensor([5, 0, 12])
    x = moved(torch.randn(20, K, dtype=HALF), 1)

    def experts(
        x: Tensor = x,
        counts: Tensor = counts,
        bias: Tensor | None = bias,
        **changes: Tensor,
    ) -> Tensor:
        g = replace(grid, **changes)
        operands = (g.qweight, g.scales, g.zeros, None)
        y: Tensor = torch.ops.hfq.cuda_experts_linear(x, counts, *operands, bias, *SIZES)
        return y

    y = experts()
    assert not y[17:].any(), "zeros behind the sum of counts"
    for expert, tokens in ((0, slice(0, 5)), (2, slice(5, 13)), (2, slice(13, 17))):
        alone = ROW.linear(x[tokens], grid.expert(expert), bias[expert], False)
        # More than 8 tokens of one weight go through a kernel that sums in another order.
        torch.testing.assert_close(y[tokens], alone)
    assert torch.equal(ROW.experts(x, counts, grid, bias, False), y)
    assert experts(x[:0], torch.zeros(3).long()).shape == (0, N)
    leaf = x[:17].clone().requires_grad_()
    ROW.experts(leaf, counts, grid, bias, False).sum().backward()
    assert leaf.grad is not None and leaf.grad.any()

    assert grid.zeros is not None
    none = grid.qweight[:0]
    refused("takes 1 to 1024 experts, got 0", experts, qweight=none)
    many = none.new_empty(1025, *none.shape[1:])
    refused("takes 1 to 1024 experts, got 1025", experts, qweight=many)
    refused("takes up to 2.20 tokens", experts, x.new_empty((1 << 20) + 1, K))
    refused("counts must be int64", experts, counts=counts.int())
    refused("counts must be of shape", experts, counts=counts[:2])
    refused("counts must be contiguous", experts, counts=strided(counts))
    refused("qweight must be of shape", experts, qweight=grid.qweight[0])
    refused("scales must be of shape", experts, scales=grid.scales[:2])
    refused("zeros must be of shape", experts, zeros=grid.zeros[0])
    refused("bias must be of shape", experts, bias=bias[0])
    refused("x must be float16 or bfloat16", experts, x.float())
    refused("x must be of shape", experts, x[:, 8:])
    arguments = (x, counts, grid.qweight, grid.scales, grid.zeros, None, bias, *SIZES)
    torch.library.opcheck(torch.ops.hfq.cuda_experts_linear.default, arguments)


def check_schemas() -> None:
    grid = prepared_grid(sym=True)
    operands = (grid.qweight, grid.scales, None, None)
    check, hfq = torch.library.opcheck, torch.ops.hfq
    x = torch.randn(3, K).bfloat16().requires_grad_()
    check(hfq.cuda_linear.default, (x, *operands, torch.zeros(N), *SIZES))
    check(hfq.cuda_dequantize.default, (*operands, *SIZES, torch.float16))
    check(hfq.cuda_lookup.default, (torch.tensor([3, 47]), *operands, *SIZES, torch.float32))


check_modules(N, K, ROW, SPECS, many=70)
check_table(N, K, "int", IntSpec(group_size=32))
check_arguments()
check_pairs()
check_experts()
check_schemas()
sys.stdout.write("all checks passed\n")
