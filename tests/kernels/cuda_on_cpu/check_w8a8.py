"""Run by test_cuda_w8a8_emulated.py in a process of its own: operators for activations of 8 bits are on the CPU those of CUDA, emulated.

See operators_on_cpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from operators_on_cpu import (
    HALF,
    check_module,
    linear_module,
    moved,
    on_cpu,
    prepare,
    refused,
    strided,
)
from torch import Tensor
from w8a8_weights import FLOATS, FP8, INT8, KINDS, K, Kind, N, check_schemas, check_sums_schema

from hfq.core.activations import quantize_tokens
from hfq.kernels import cuda_int8_ops
from hfq.nn.linear import QuantLinear

cuda_int8_ops._SUMS = 4 * N * 25  # 40 tokens in two parts
ROWS = {kind: on_cpu(type(kind.row)) for kind in KINDS}


def module_of(kind: Kind, activation: str) -> QuantLinear:
    module = linear_module(N, K, kind.format, replace(kind.spec, activation=activation))
    if activation == "static":
        static = {"weight_input_scale": torch.tensor([kind.static])}
        module.set_packed("weight", {**module.neutral_tensors("weight"), **static})
    return module


def check_modules(kind: Kind) -> None:
    for activation in ("dynamic", "static"):
        module = module_of(kind, activation)
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
            # Bfloat16 on the way where the matrix library multiplies E4M3.
            return 0.0 if kind is INT8 else 2**-7 if dtype.itemsize == 2 else 1e-5

        counts, dtypes = (0, 1, 5, 32, 33, 40), (*FLOATS, torch.float64)
        check_module(module, ROWS[kind], counts, dtypes, expected, bound)
        assert torch.equal(module._parameters["qweight"], neutral["weight"])


def check_arguments(kind: Kind) -> None:
    grid = prepare(module_of(kind, "static"), ROWS[kind])
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


for kind in KINDS:
    check_modules(kind)
    check_arguments(kind)
    for activation in ("dynamic", "static"):
        grid = prepare(module_of(kind, activation), ROWS[kind])
        for tokens in (0, 3, 40):
            x = torch.randn(tokens, K).bfloat16().requires_grad_()
            check_schemas(kind, grid, x)
            if kind is FP8:
                scaled = torch.ops.hfq.fp8_scaled_linear.default
                arguments = kind.arguments(grid, torch.zeros(N).requires_grad_())
                torch.library.opcheck(scaled, (x, *arguments))
check_sums()
sys.stdout.write("all checks passed\n")
