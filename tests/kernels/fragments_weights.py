"""Random weights in layout fragments for tests of kernels: any codes, scales and zeros, not only those that a method chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfq.core import bits as bit_packing
from hfq.core.codebooks import codebook
from hfq.core.float8 import e4m3_table
from hfq.kernels import fragments, reference

# bits, codebook or zero points
Kind = tuple[int, str | None]
KINDS: tuple[Kind, ...] = (
    *((bits, extra) for bits in (2, 3, 4, 8) for extra in (None, "zeros")),
    *((4, name) for name in ("nf4", "fp4")),
    (8, "e4m3"),
)
# N, K, group_size; 0: one group per row
Shape = tuple[int, int, int]
# Odd numbers of rows, blocks and groups that are not full, K of one lane and of many rounds.
SHAPES: tuple[Shape, ...] = (
    (1, 8, 0),
    (17, 136, 32),
    (40, 512, 128),
    (16, 264, 64),
    (33, 200, 0),
    (5, 1096, 96),
    (48, 2056, 128),
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Largest relative error of rounding to nearest.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FEW_TOKENS = 8  # kernels/cuda/linear.cu


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

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Weights as kernels multiply them that round them (wgmma_rounded.h): those of the reference, but that a table holds numbers of that dtype, and for scales in two parts."""
        _, scales, zeros, table = self.neutral
        assert scales is not None
        looked_up = table is not None and self.sizes[0] == 4
        values = self.values.to(dtype) if looked_up else self.values
        if dtype == torch.bfloat16 and zeros is None and scales.dtype != dtype:
            return _in_two_parts(values.double(), self.scales)
        if looked_up:
            return (values.float() * self.scales.float()).to(dtype)
        return self.reference(dtype)

    def check(
        self,
        y: Tensor,
        x: Tensor,
        bias: Tensor | None = None,
        rounded: bool = False,
        digits: bool = False,
    ) -> None:
        """Whether y is x W^T + bias up to the roundings that the kernel makes; `rounded`: of weights in 16 bits, too;
        `digits`: of a codebook to multiples of 1/8191 of its largest number."""
        values = self.values
        if self.operands[3] is not None and digits:
            unit = self.operands[3].abs().max().double() / 8191
            values = (values / unit).round() * unit
        elif self.operands[3] is not None:
            values = values.to(x.dtype).double()  # the table holds numbers of that dtype
        weights, bounds = values * self.scales, self.magnitudes * self.scales
        if rounded:
            weights = self.rounded(x.dtype).double()
            bounds = weights.abs()
        expected, largest = x.double() @ weights.T, x.double().abs() @ bounds.T
        if bias is not None:
            expected += bias.double()
            largest += bias.double().abs()
        # Sums in float32: of each unit of 32 columns two instructions and two operations for its scale, of few tokens in one of 4 warps or more.
        roundings = 16 + x.shape[1] / 32 * 4 / (4 if len(x) <= FEW_TOKENS else 1)
        bound = roundings * 2.0**-24 * largest + ROUNDING[x.dtype] * expected.abs() + 2.0**-25
        assert y.dtype == x.dtype and y.shape == expected.shape
        error = (y.double() - expected).abs()
        assert (error <= bound).all(), (error / bound).max()

    def reference(self, dtype: torch.dtype) -> Tensor:
        return reference.dequantize(*self.neutral, None, *self.sizes[:3], dtype)  # type: ignore[arg-type]

    def with_codebook(self, numbers: Tensor) -> Weight:
        """The same codes, of nf4, with other numbers."""
        codes = torch.searchsorted(codebook("nf4").double(), self.values)
        values = numbers.double()[codes]
        return replace(
            self,
            neutral=(*self.neutral[:3], numbers),
            operands=(*self.operands[:3], numbers),
            values=values,
            magnitudes=values.abs(),
        )

    def with_bad_scale(self, row: int, group: int) -> Weight:
        """The same operands but for NaN in place of a scale."""
        scales = self.neutral[1]
        assert scales is not None
        scales = scales.clone()
        scales[row, group] = torch.nan
        bad = fragments.to_fragments(scales, self.sizes[0])
        return replace(self, operands=(self.operands[0], bad, *self.operands[2:]))


def _in_two_parts(values: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 of values times scales (float64) by two multiply-adds in bfloat16."""
    high = scales.bfloat16().double()
    rest = (scales - high).bfloat16().double()
    return _nearest(values * high + _nearest(values * rest)).bfloat16()


def _nearest(numbers: Tensor) -> Tensor:
    """Rounded once to the 8 bits of bfloat16s; PyTorch would round float64 to float32 before."""
    dropped = 52 - 7
    bits = numbers.view(torch.int64)
    bits = bits + (1 << dropped - 1) - 1 + (bits >> dropped & 1)
    return (bits >> dropped << dropped).view(torch.float64)


def random_weight(
    generator: torch.Generator,
    shape: Shape,
    kind: Kind,
    scale_dtype: torch.dtype = torch.float16,
    largest_scale: float = 0.021,
) -> Weight:
    (rows, columns, group_size), (bits, extra) = shape, kind
    group_size = group_size or columns
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0, 0], codes[-1, -1] = 0, (1 << bits) - 1
    scales = torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3
    scales = (scales * (largest_scale / 0.021)).to(scale_dtype)
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
        if extra == "e4m3":
            codes[codes & 0x7F == 0x7F] ^= 1  # NaN, which no weight has
        table = e4m3_table() if extra == "e4m3" else codebook(extra)
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


def name_of(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
