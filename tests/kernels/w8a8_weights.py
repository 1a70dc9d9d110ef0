"""Weights for activations of 8 bits, of either kind: for tests of the kernels that they share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3, e4m3_table
from hfq.core.spec import Fp8Spec, Int8Spec
from hfq.core.weight import Fp8Grid, PackedGrid
from hfq.kernels import cuda_fp8, cuda_int8, cuda_int8_ops, dispatch, fp8
from hfq.kernels.int8 import int8_linear
from hfq.kernels.row import Problem

assert cuda_int8_ops.__doc__ is not None  # defines torch.ops.hfq.cuda_*

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
N, K = 48, 144


class Int8:
    """Format int8. Sums are integers, so that a product is the reference's to the bit."""

    format, spec, dtype = "int8", Int8Spec(activation="dynamic"), torch.int8
    row = cuda_int8.CudaInt8()
    products = (torch.ops.hfq.cuda_int8_linear, torch.ops.hfq.cuda_int8_linear_cublas)
    quantize_tokens = torch.ops.hfq.cuda_quantize_tokens
    dequantize = torch.ops.hfq.cuda_int8_dequantize
    static = 0.02  # beyond which some activations of tests lie

    def __str__(self) -> str:
        return self.format

    def stored(
        self,
        generator: torch.Generator,
        rows: int = N,
        columns: int = K,
        static: float | None = None,
    ) -> PackedGrid:
        """A random weight in the neutral layout, scales of either sign."""
        codes = torch.randint(0, 256, (rows, columns, 1), dtype=torch.uint8, generator=generator)
        codes[0, 0], codes[-1, -1] = 0, 255
        return PackedGrid(
            qweight=codes,
            scales=torch.randn(rows, 1, generator=generator) * 0.01,
            zeros=None,
            codebook=None,
            g_idx=None,
            bits=8,
            group_size=columns,
            in_features=columns,
            out_features=rows,
            activation="dynamic" if static is None else "static",
            input_scale=None if static is None else torch.tensor([static]),
        )

    def weight(self, grid: PackedGrid) -> Tensor:
        """Float32, of a weight in the neutral layout."""
        return (grid.qweight.squeeze(-1).float() - 128) * grid.scales

    def arguments(self, grid: PackedGrid, bias: Tensor | None) -> tuple[object, ...]:
        """Of `products`, behind x."""
        operands = (grid.qweight, grid.scales, grid.input_scale, bias)
        return (*operands, grid.in_features, grid.out_features)

    def expected(self, x: Tensor, grid: PackedGrid, bias: Tensor | None = None) -> Tensor:
        """The product in PyTorch, for a weight in the neutral layout."""
        return int8_linear(x, grid.qweight, grid.scales, grid.input_scale, bias, grid.in_features)

    def expected_of_row(self, x: Tensor, grid: PackedGrid, bias: Tensor | None = None) -> Tensor:
        return self.expected(x, grid, bias)

    def check(
        self, y: Tensor, x: Tensor, grid: PackedGrid, bias: Tensor | None, roundings: float
    ) -> None:
        assert equal(y, self.expected(x, grid, bias))


class Fp8:
    """Format fp8 with E4M3 activations."""

    format, spec, dtype = "fp8", Fp8Spec(activation="dynamic"), E4M3
    row = cuda_fp8.CudaFp8()
    products = (torch.ops.hfq.cuda_fp8_linear,)
    quantize_tokens = torch.ops.hfq.cuda_fp8_quantize_tokens
    dequantize = torch.ops.hfq.cuda_fp8_dequantize
    static = 0.004

    def __str__(self) -> str:
        return self.format

    def stored(
        self,
        generator: torch.Generator,
        rows: int = N,
        columns: int = K,
        static: float | None = None,
    ) -> Fp8Grid:
        """A random weight without NaN."""
        codes = torch.randint(0, 127, (rows, columns, 1), generator=generator)
        codes[0, 0], codes[-1, -1] = 0, 126
        signs = torch.randint(0, 2, codes.shape, generator=generator) * 128
        return Fp8Grid(
            qweight=(codes + signs).to(torch.uint8),
            scales=torch.rand(rows, 1, generator=generator) * 0.01,
            values=e4m3_table(),
            in_features=columns,
            out_features=rows,
            activation="dynamic" if static is None else "static",
            input_scale=None if static is None else torch.tensor([static]),
        )

    def weight(self, grid: Fp8Grid) -> Tensor:
        return grid.qweight.squeeze(-1).view(E4M3).float() * grid.scales

    def arguments(self, grid: Fp8Grid, bias: Tensor | None) -> tuple[object, ...]:
        return grid.qweight, grid.scales, grid.input_scale, bias

    def expected(self, x: Tensor, grid: Fp8Grid, bias: Tensor | None = None) -> Tensor:
        return fp8.linear(x, grid.qweight, grid.scales, grid.input_scale, bias)

    def expected_of_row(self, x: Tensor, grid: Fp8Grid, bias: Tensor | None = None) -> Tensor:
        """Many tokens of 16 bits are left to the matrix library."""
        many = x[..., 0].numel() > cuda_fp8.MAX_DIRECT_TOKENS and x.dtype.itemsize == 2
        linear = fp8.scaled_linear if many else fp8.linear
        return linear(x, grid.qweight, grid.scales, grid.input_scale, bias)

    def check(
        self, y: Tensor, x: Tensor, grid: Fp8Grid, bias: Tensor | None, roundings: float
    ) -> None:
        """Each number beside the definition in float64: up to so many roundings of float32 sums, and one of the result."""
        rounded, token_scales = quantize_tokens(x, grid.input_scale, E4M3)
        factors = token_scales.double() * grid.scales.double().T
        left, right = rounded.double(), grid.qweight.squeeze(-1).view(E4M3).double()
        expected = left @ right.T * factors
        size = left.abs() @ right.abs().T * factors.abs()
        if bias is not None:
            expected, size = expected + bias.double(), size + bias.double().abs()
        allowed = size * roundings * 2**-24
        allowed += torch.finfo(x.dtype).eps / 2 * expected.abs() + torch.finfo(x.dtype).tiny
        assert y.dtype == x.dtype and y.shape == expected.shape
        none = expected.isnan()
        assert torch.equal(y.isnan(), none)
        overflowed = expected.abs() > torch.finfo(x.dtype).max
        error = (y.double() - expected).abs()
        assert bool((none | (error <= allowed) | (overflowed & y.isinf())).all())


class Widened(Fp8):
    """The same with the kernel row that multiplies in 16 bits."""

    row = cuda_fp8.CudaFp8Widened()
    products = (torch.ops.hfq.cuda_fp8_linear, torch.ops.hfq.fp8_widened_linear)

    def __str__(self) -> str:
        return "fp8 widened"

    def expected_of_row(self, x: Tensor, grid: Fp8Grid, bias: Tensor | None = None) -> Tensor:
        return self.expected(x, grid, bias)


Kind = Int8 | Fp8
INT8, FP8, WIDENED = Int8(), Fp8(), Widened()
# Of codes; of kernel rows.
KINDS = (INT8, FP8)
ROWS = (*KINDS, WIDENED)


def prepared(kind: Kind, grid: Any) -> Any:
    """In the layout of the kernel row."""
    qweight, scales = (kind.row.prepare(each, 8) for each in (grid.qweight, grid.scales))
    return replace(grid, qweight=qweight, scales=scales)


def dense(grid: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return dispatch.rows(type(grid))[-1].dequantize(grid, dtype)


def check_schemas(kind: Kind, ready: Any, x: Tensor) -> None:
    """Operators as PyTorch wants them, for tokens x and a weight `[N, K]` of the kernel row's layout."""
    check = torch.library.opcheck
    bias = torch.ones(N, device=x.device).requires_grad_()
    for product in kind.products:
        check(product.default, (x, *kind.arguments(ready, bias)))
    check(kind.quantize_tokens.default, (x.detach(), ready.input_scale))
    check(kind.dequantize.default, (ready.qweight, ready.scales, x.dtype))


def check_sums_schema(tokens: int, scales: Tensor) -> None:
    sums, token_scales = torch.zeros(tokens, N, dtype=torch.int32), torch.ones(tokens, 1)
    out = torch.zeros(tokens, N)
    scale_sums = torch.ops.hfq.cuda_scale_sums.default
    torch.library.opcheck(scale_sums, (out, sums, token_scales, scales, None))


def problem_of(kind: Kind, **changed: Any) -> Problem:
    """What a kernel row is asked of a weight 32 x 64 on the CPU."""
    return replace(Problem.of(kind.stored(torch.Generator(), 32, 64)), **changed)


def equal(found: Tensor, expected: Tensor) -> bool:
    """The same numbers; any NaN is NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool(same.all())
