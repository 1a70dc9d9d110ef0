"""Run by test_cuda_w8a8_emulated.py in a process of its own: operators for activations of 8 bits are on the CPU those of CUDA, emulated.

See operators_on_cpu.py.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from operators_on_cpu import (
    HALF,
    check_module,
    emulated,
    linear_module,
    moved,
    on_cpu,
    prepare,
    refused,
    strided,
)
from torch import Tensor
from w8a8_weights import (
    FLOATS,
    FP8,
    INT8,
    KINDS,
    ROWS,
    WIDENED,
    K,
    Kind,
    N,
    check_schemas,
    check_sums_schema,
    prepared,
)

from hfq.core.activations import quantize_tokens
from hfq.kernels import cuda_int8_ops
from hfq.nn.linear import QuantLinear

cuda_int8_ops._SUMS = 4 * N * 25  # 40 tokens in two parts
ON_CPU = {kind: on_cpu(type(kind.row)) for kind in ROWS}


def module_of(kind: Kind, activation: str, rows: int = N, columns: int = K) -> QuantLinear:
    module = linear_module(rows, columns, kind.format, replace(kind.spec, activation=activation))
    if activation == "static":
        static = {"weight_input_scale": torch.tensor([kind.static])}
        module.set_packed("weight", {**module.neutral_tensors("weight"), **static})
    return module


def check_modules(kind: Kind) -> None:
    for activation in ("dynamic", "static"):
        module = module_of(kind, activation, *((41, 140) if kind is WIDENED else (N, K)))
        neutral = {name: each.clone() for name, each in module.neutral_tensors("weight").items()}
        stored = replace(
            module.grid("weight"),
            qweight=neutral["weight"],
            scales=neutral["weight_scale"],
            input_scale=neutral.get("weight_input_scale"),
        )

        def expected(x: Tensor, stored: Any = stored, bias: Tensor | None = module.bias) -> Tensor:
            return kind.expected(x, stored, bias)

        def bound(dtype: torch.dtype) -> float:
            # Bfloat16 on the way where the matrix library multiplies E4M3; sums in another order.
            return 0.0 if kind is INT8 else 2**-7 if dtype.itemsize == 2 else 1e-5

        counts, dtypes = (0, 1, 5, 32, 33, 40), (*FLOATS, torch.float64)
        if kind is WIDENED:
            counts = (0, 1, 5, 33, 130)
        check_module(module, ON_CPU[kind], counts, dtypes, expected, bound)
        assert torch.equal(module._parameters["qweight"], neutral["weight"])


def check_arguments(kind: Kind) -> None:
    grid = prepare(module_of(kind, "static"), ON_CPU[kind])
    static = grid.input_scale
    assert static is not None
    x = moved(torch.randn(6, K, dtype=HALF), 1)

    def linear(x: Tensor = x, bias: Tensor | None = None, **changes: Any) -> Tensor:
        y: Tensor = kind.products[0](x, *kind.arguments(replace(grid, **changes), bias))
        return y

    for tokens in (2, 6):
        part = x[:tokens]
        assert torch.equal(linear(part), linear(part.clone())), "activations that begin anywhere"
    if kind is INT8:
        refused("in_features must be a multiple of 16 up", linear, in_features=136)
        refused("in_features must be a multiple of 16 up", linear, in_features=1 << 18)
        refused("out_features must be between", linear, out_features=0)
        refused("qweight must be uint8", linear, qweight=grid.qweight.char())
        refused("qweight must be of shape", linear, qweight=grid.qweight[1:])
    else:
        refused("qweight must be uint8 of shape", linear, qweight=grid.qweight.char())
        refused("qweight must be uint8 of shape", linear, qweight=grid.qweight[..., 0])
        refused("in_features must be a multiple of 16 up", linear, qweight=grid.qweight[:, 8:])
        refused("in_features must be a multiple of 16 up", linear, qweight=grid.qweight[:, :0])
        refused("out_features must be between", linear, qweight=grid.qweight[:0])
    refused("qweight must be contiguous", linear, qweight=strided(grid.qweight))
    refused("qweight must be aligned to 16", linear, qweight=moved(grid.qweight, 1))
    refused("scales must be of shape", linear, scales=grid.scales[1:])
    refused("scales must be float32, float16", linear, scales=grid.scales.double())
    refused("input_scale must be float32", linear, input_scale=static.double())
    refused("input_scale must be of shape", linear, input_scale=torch.ones(2))
    refused("bias must be of shape", linear, bias=torch.zeros(N + 1))
    refused("x must be float32, float16", linear, x.double())
    refused("x must be of shape", linear, x[:, 16:])
    refused("x must be contiguous", linear, strided(x))
    for tokens in (0, 1, 6):
        for scale in (None, static):
            codes, scales = kind.quantize_tokens(x[:tokens], scale)
            wanted = quantize_tokens(x[:tokens], scale, kind.dtype)
            assert codes.dtype == kind.dtype and codes.shape == wanted[0].shape
            assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
            assert torch.equal(scales, wanted[1])
    refused("x must be of shape", kind.quantize_tokens, x[0], None)
    wrong = x[:, 8:].clone()
    refused("in_features must be a multiple of 16", kind.quantize_tokens, wrong, None)
    refused("input_scale must be float32", kind.quantize_tokens, x, static.half())


def check_sums() -> None:
    scales = INT8.stored(torch.Generator()).scales
    sums, out, ones = torch.zeros(6, N, dtype=torch.int32), torch.zeros(6, N), torch.ones(6, 1)

    def scale_sums(
        out: Tensor = out,
        sums: Tensor = sums,
        token_scales: Tensor = ones,
        scales: Tensor = scales,
        bias: Tensor | None = None,
    ) -> Tensor:
        torch.ops.hfq.cuda_scale_sums(out, sums, token_scales, scales, bias)
        return out

    scale_sums()
    refused("sums must be int32", scale_sums, sums=sums.long())
    refused("sums must be contiguous", scale_sums, sums=strided(sums))
    refused("out must be of shape", scale_sums, out[1:])
    refused("out must be float32", scale_sums, out.double())
    refused("token_scales must be of shape", scale_sums, token_scales=out[:, 0].clone())
    refused("scales must be of shape", scale_sums, scales=scales[1:])
    refused("bias must be of shape", scale_sums, bias=torch.zeros(1))
    for tokens in (0, 3, 40):
        check_sums_schema(tokens, scales)


def check_dequantize() -> None:
    """Whole weights and stacks of them; what is refused."""
    for kind, dtype in itertools.product(KINDS, FLOATS):
        grid = kind.stored(torch.Generator())
        ready, dequantize = prepared(kind, grid), partial(kind.dequantize, dtype=dtype)
        assert torch.equal(dequantize(ready.qweight, ready.scales), kind.weight(grid).to(dtype))
        assert not dequantize(ready.qweight[:0], ready.scales[:0]).numel()
        refused("qweight must be of shape", dequantize, ready.qweight[0], ready.scales)
        refused("qweight must be uint8", dequantize, ready.qweight.char(), ready.scales)
        refused("qweight must be contiguous", dequantize, strided(ready.qweight), ready.scales)
        refused("scales must be of shape", dequantize, ready.qweight, ready.scales[1:])
        refused("scales must be float32, float16", dequantize, ready.qweight, ready.scales.double())
        refused("dtype must be", kind.dequantize, ready.qweight, ready.scales, torch.float64)
    grids = [FP8.stored(torch.Generator(), 5, 7) for _ in range(3)]
    stack = [
        torch.stack(each) for each in zip(*((g.qweight, g.scales) for g in grids), strict=True)
    ]
    weight = FP8.dequantize(*stack, HALF)
    assert torch.equal(weight, torch.stack([FP8.weight(grid) for grid in grids]).to(HALF))


def check_widened() -> None:
    """Any shape, few and many tokens, siblings, experts: one rounding behind float32 sums."""
    row = ON_CPU[WIDENED]
    for rows, columns in ((41, 140), (5, 7), (33, 528)):
        grids = [WIDENED.stored(torch.Generator(), rows, columns) for _ in range(3)]
        for grid in grids:
            grid.scales.mul_(torch.rand(rows, 1))
        stack = replace(
            grids[0],
            qweight=torch.stack([grid.qweight for grid in grids]),
            scales=torch.stack([grid.scales for grid in grids]),
        )
        ready, experts = [prepared(WIDENED, grid) for grid in grids], prepared(WIDENED, stack)
        whole, _ = row.stack(ready)
        static = torch.tensor([WIDENED.static])
        for tokens, dtype in itertools.product((1, 3, 7, 33, 129), FLOATS):
            x = torch.randn(tokens, columns).to(dtype)
            bias = torch.randn(3, rows).to(dtype) if tokens % 2 else None
            own = None if bias is None else bias[0]
            for scale in (None, static):
                y = row.linear(x, replace(ready[0], input_scale=scale), own, False)
                wanted = replace(grids[0], input_scale=scale)
                WIDENED.check(y, x, wanted, own, roundings=columns + 3)
            joined = row.linear(x, whole, None, False).split(rows, dim=-1)
            for part, grid in zip(joined, grids, strict=True):
                WIDENED.check(part, x, grid, None, roundings=columns + 3)
            counts = torch.tensor([tokens // 3, 0, tokens - tokens // 3])
            assert row.reads_counts_on_device(x, tokens, experts)
            y = row.experts(x, counts, experts, bias, False)
            for expert, part in enumerate(torch.arange(tokens).split(counts.tolist())):
                own = None if bias is None else bias[expert]
                WIDENED.check(y[part], x[part], grids[expert], own, roundings=columns + 3)


for kind in ROWS:
    emulated.set_compute_capability(80 if kind is WIDENED else 89)
    check_modules(kind)
    if kind in KINDS:
        check_arguments(kind)
    for activation in ("dynamic", "static"):
        grid = prepare(module_of(kind, activation), ON_CPU[kind])
        for tokens in (0, 3, 40):
            x = torch.randn(tokens, K).bfloat16().requires_grad_()
            check_schemas(kind, grid, x)
            if kind is FP8:
                scaled = torch.ops.hfq.fp8_scaled_linear.default
                arguments = kind.arguments(grid, torch.zeros(N).requires_grad_())
                torch.library.opcheck(scaled, (x, *arguments))
check_dequantize()
check_widened()
check_sums()
sys.stdout.write("all checks passed\n")
