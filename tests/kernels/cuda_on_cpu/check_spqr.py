"""Run by test_cuda_spqr_emulated.py in a process of its own: the operators ``hfq::cuda_spqr_*`` on the CPU are those of CUDA, emulated.

See operators_on_cpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from operators_on_cpu import (
    HALF,
    check_modules,
    check_table,
    linear_module,
    moved,
    on_cpu,
    prepare,
    refused,
    strided,
)
from spqr_weights import SPECS
from torch import Tensor

from hfq.core.spec import SpqrSpec
from hfq.core.weight import SpqrGrid
from hfq.kernels import cuda_spqr
from hfq.kernels.neutral_spqr import operands, sizes

N, K = 40, 136
ROW = on_cpu(cuda_spqr.CudaSpqr)


def prepared_grid() -> SpqrGrid:
    grid = prepare(linear_module(N, K, "spqr", SpqrSpec(outliers=0.02)), ROW)
    assert isinstance(grid, SpqrGrid)
    return grid


def check_arguments() -> None:
    grid = prepared_grid()
    x = moved(torch.randn(2, K, dtype=HALF), 1)

    def linear(x: Tensor = x, bias: Tensor | None = None, **changes: object) -> Tensor:
        g = replace(grid, **changes)  # type: ignore[arg-type]
        y: Tensor = torch.ops.hfq.cuda_spqr_linear(x, *operands(g), bias, *sizes(g), g.out_features)
        return y

    assert torch.equal(linear(), linear(x.clone())), "activations that begin anywhere"
    refused("bits must be 2, 3 or 4, got 5", linear, bits=5)
    refused("stat_bits must be 2 to 8, got 9", linear, stat_bits=9)
    refused("in_features must be a multiple of 8", linear, in_features=132)
    refused("in_features must be a multiple of 8", linear, in_features=1 << 19)
    refused("out_features must be between", linear, out_features=0)
    refused("group_size must be a multiple of 16", linear, group_size=24)
    refused("group_size must be a multiple of 16", linear, group_size=0)
    refused("stat_group_size must be a multiple of 16", linear, stat_group_size=8)
    refused("qweight must be uint8", linear, qweight=grid.qweight.char())
    refused("qweight must be of shape", linear, qweight=grid.qweight[1:])
    refused("qweight must be contiguous", linear, qweight=strided(grid.qweight))
    refused("stat_codes must be uint8", linear, stat_codes=grid.stat_codes.char())
    refused("stat_codes must be of shape", linear, stat_codes=grid.stat_codes[:, 1:])
    refused("stat_codes must be of shape", linear, stat_bits=5)
    refused("stat_codes must be aligned to 16", linear, stat_codes=moved(grid.stat_codes, 4))
    refused("stats must be float32, float16", linear, stats=grid.stats.double())
    refused("stats must be of shape", linear, stats=grid.stats[..., 1:])
    refused("offsets must be int32", linear, offsets=grid.offsets.long())
    refused("offsets must be of shape", linear, offsets=grid.offsets[1:])
    refused("columns must be int16 or int32", linear, columns=grid.columns.long())
    refused("columns must be of shape", linear, columns=grid.columns[None])
    refused("values must be of the same dtype as stats", linear, values=grid.values.float())
    refused("values must be of shape", linear, values=grid.values[1:])
    refused("x must be float16 or bfloat16", linear, x.float())
    refused("x must be of shape", linear, x[:, 8:])
    refused("x must be of shape", linear, x[None])
    refused("x must be contiguous", linear, strided(x))
    refused("bias must be of shape", linear, bias=torch.zeros(N + 1))
    refused("bias must be float32", linear, bias=torch.zeros(N).int())
    lookup, last = torch.ops.hfq.cuda_spqr_lookup, (*operands(grid), *sizes(grid), N)
    refused("index must be int64", lookup, torch.zeros(1).int(), *last, torch.float16)
    refused("dtype must be float32", lookup, torch.zeros(1).long(), *last, torch.int8)


def check_schemas() -> None:
    grid = prepared_grid()
    ready, numbers = operands(grid), (*sizes(grid), N)
    check, hfq = torch.library.opcheck, torch.ops.hfq
    x = torch.randn(3, K).bfloat16().requires_grad_()
    check(hfq.cuda_spqr_linear.default, (x, *ready, torch.zeros(N), *numbers))
    check(hfq.cuda_spqr_dequantize.default, (*ready, *numbers, torch.float16))
    check(hfq.cuda_spqr_lookup.default, (torch.tensor([3, 39]), *ready, *numbers, torch.float32))


check_modules(N, K, ROW, [("spqr", spec) for spec in SPECS], many=260)
check_table(N, K, "spqr", SpqrSpec(outliers=0.02))
check_arguments()
check_schemas()
sys.stdout.write("all checks passed\n")
