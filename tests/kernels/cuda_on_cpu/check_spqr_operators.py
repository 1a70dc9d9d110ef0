"""Run by test_cuda_spqr_emulated.py in a process of its own: the operators ``hfq::cuda_spqr_*`` on the CPU are those of CUDA, emulated.

See operators_on_cpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from operators_on_cpu import on_cpu, refused, strided, use_row
from torch import Tensor, nn

from hfq.core.spec import SpqrSpec
from hfq.core.weight import SpqrGrid
from hfq.kernels import cuda_spqr
from hfq.kernels.neutral_spqr import operands, sizes
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear

N, K = 40, 136
ROW = on_cpu(cuda_spqr.CudaSpqr)


def linear_module(spec: SpqrSpec) -> QuantLinear:
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    return QuantLinear.from_linear(linear, format="spqr", spec=spec)


def check_modules() -> None:
    for spec in (
        SpqrSpec(outliers=0.03),
        SpqrSpec(bits=2, group_size=32, stat_group_size=16, outliers=0.1, scale_dtype="bfloat16"),
        SpqrSpec(bits=4, group_size=64, stat_bits=5, stat_group_size=32, scale_dtype="float32"),
        SpqrSpec(bits=4, group_size=-1, stat_bits=8, stat_group_size=256, outliers=0),
    ):
        module = linear_module(spec)
        saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        weight = module.dequantize().double()
        module.restore()
        use_row(SpqrGrid, ROW)
        module.prepare()
        assert module.kernel_choice("weight").row is ROW
        assert module.bias is not None
        for tokens in (0, 1, 3, 9, 40):
            x = torch.randn(2, tokens, K).bfloat16()[1].requires_grad_()
            expected = x.detach().double() @ weight.T + module.bias.double()
            y = module(x)
            torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
            grad = torch.randn(tokens, N).bfloat16()
            y.backward(grad)
            assert x.grad is not None
            torch.testing.assert_close(
                x.grad.double(), grad.double() @ weight, rtol=1e-2, atol=1e-2
            )
        with torch.no_grad():
            x = torch.randn(1, K)
            dense = module.dequantize().float()
            expected = torch.nn.functional.linear(x, dense, module.bias.float())
            torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-2)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        module.restore()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[name]), name

    table = QuantEmbedding.from_embedding(
        nn.Embedding(N, K, dtype=torch.bfloat16), format="spqr", spec=SpqrSpec(outliers=0.02)
    )
    ids = torch.randint(N, (2, 5))
    assert torch.equal(table(ids), table.dequantize()[ids])


def prepared_grid() -> SpqrGrid:
    module = linear_module(SpqrSpec(outliers=0.02))
    module.prepare()
    grid = module.grid("weight")
    assert isinstance(grid, SpqrGrid) and module.kernel("weight") is ROW
    return grid


def check_arguments() -> None:
    grid = prepared_grid()
    moved = torch.randn(2 * K + 1).bfloat16()[1:].view(2, K)
    shifted = torch.zeros(grid.stat_codes.numel() + 4, dtype=torch.uint8)[4:]
    shifted = shifted.view(grid.stat_codes.shape)

    def linear(x: Tensor = moved, bias: Tensor | None = None, **changes: object) -> Tensor:
        g = replace(grid, **changes)  # type: ignore[arg-type]
        y: Tensor = torch.ops.hfq.cuda_spqr_linear(x, *operands(g), bias, *sizes(g), g.out_features)
        return y

    assert torch.equal(linear(), linear(moved.clone())), "activations that begin anywhere"
    for words, changes in (
        ("bits must be 2, 3 or 4, got 5", {"bits": 5}),
        ("stat_bits must be 2 to 8, got 9", {"stat_bits": 9}),
        ("in_features must be a multiple of 8", {"in_features": 132}),
        ("in_features must be a multiple of 8", {"in_features": 1 << 19}),
        ("out_features must be between", {"out_features": 0}),
        ("group_size must be a multiple of 16", {"group_size": 24}),
        ("group_size must be a multiple of 16", {"group_size": 0}),
        ("stat_group_size must be a multiple of 16", {"stat_group_size": 8}),
        ("qweight must be uint8", {"qweight": grid.qweight.char()}),
        ("qweight must be of shape", {"qweight": grid.qweight[1:]}),
        ("qweight must be contiguous", {"qweight": strided(grid.qweight)}),
        ("stat_codes must be uint8", {"stat_codes": grid.stat_codes.char()}),
        ("stat_codes must be of shape", {"stat_codes": grid.stat_codes[:, 1:]}),
        ("stat_codes must be of shape", {"stat_bits": 5}),
        ("stat_codes must be aligned to 16", {"stat_codes": shifted}),
        ("stats must be float32, float16", {"stats": grid.stats.double()}),
        ("stats must be of shape", {"stats": grid.stats[..., 1:]}),
        ("offsets must be int32", {"offsets": grid.offsets.long()}),
        ("offsets must be of shape", {"offsets": grid.offsets[1:]}),
        ("columns must be int16 or int32", {"columns": grid.columns.long()}),
        ("columns must be of shape", {"columns": grid.columns[None]}),
        ("values must be of the same dtype as stats", {"values": grid.values.float()}),
        ("values must be of shape", {"values": grid.values[1:]}),
    ):
        refused(words, lambda changes=changes: linear(**changes))  # type: ignore[misc]
    refused("x must be float16 or bfloat16", lambda: linear(moved.float()))
    refused("x must be of shape", lambda: linear(moved[:, 8:]))
    refused("x must be of shape", lambda: linear(moved[None]))
    refused("x must be contiguous", lambda: linear(strided(moved)))
    refused("bias must be of shape", lambda: linear(bias=torch.zeros(N + 1)))
    refused("bias must be float32", lambda: linear(bias=torch.zeros(N).int()))
    lookup, last = torch.ops.hfq.cuda_spqr_lookup, (*operands(grid), *sizes(grid), N)
    refused("index must be int64", lambda: lookup(torch.zeros(1).int(), *last, torch.float16))
    refused("dtype must be float32", lambda: lookup(torch.zeros(1).long(), *last, torch.int8))


def check_schemas() -> None:
    grid = prepared_grid()
    ready, numbers = operands(grid), (*sizes(grid), N)
    check, hfq = torch.library.opcheck, torch.ops.hfq
    x = torch.randn(3, K).bfloat16().requires_grad_()
    check(hfq.cuda_spqr_linear.default, (x, *ready, torch.zeros(N), *numbers))
    check(hfq.cuda_spqr_dequantize.default, (*ready, *numbers, torch.float16))
    check(hfq.cuda_spqr_lookup.default, (torch.tensor([3, 39]), *ready, *numbers, torch.float32))


torch.manual_seed(0)
check_modules()
check_arguments()
check_schemas()
sys.stdout.write("all checks passed\n")
