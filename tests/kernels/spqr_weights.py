"""Random weights of format ``spqr`` for tests of kernels: any codes, scales and outliers, not only those that a method chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from fragments_weights import ROUNDING, Shape
from torch import Tensor

from hfq.core import bits as bit_packing
from hfq.core.spec import SpqrSpec
from hfq.core.weight import SpqrGrid, index_dtype
from hfq.kernels import reference
from hfq.kernels.cuda_spqr import CudaSpqr
from hfq.kernels.neutral_spqr import operands, sizes

ROW = CudaSpqr()
BITS = (2, 3, 4)
# (N, K, group_size; 0: one group per row): odd numbers of rows, blocks and groups that are not full, steps that end anywhere.
SHAPES: tuple[Shape, ...] = (
    (1, 8, 0),
    (17, 136, 16),
    (40, 520, 32),
    (33, 200, 0),
    (5, 1096, 48),
    (150, 264, 64),
)
# Bits of codes of scales, rows that share lines.
STATS = ((2, 16), (3, 64), (4, 32), (5, 128), (8, 16))
# All numbers of bits and dtypes of scales, groups and none, outliers and none.
SPECS = (
    SpqrSpec(outliers=0.03),
    SpqrSpec(bits=2, group_size=32, stat_group_size=16, outliers=0.1, scale_dtype="bfloat16"),
    SpqrSpec(bits=4, group_size=64, stat_bits=5, stat_group_size=32, scale_dtype="float32"),
    SpqrSpec(bits=4, group_size=-1, stat_bits=8, stat_group_size=256, outliers=0),
)


@dataclass(frozen=True)
class Weight:
    """A random weight.

    Attributes:
        neutral, ready: as stored and as the CUDA kernels read it.
        values, magnitudes: exact weights `[N, K]` in float64, and bounds of what is added up in their place.
        dense: the weights without outliers.
    """

    neutral: SpqrGrid
    ready: SpqrGrid
    values: Tensor
    magnitudes: Tensor
    dense: Tensor

    def reference(self, dtype: torch.dtype) -> Tensor:
        return reference.spqr_dequantize(*operands(self.neutral), *sizes(self.neutral), dtype)

    def check(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Whether y is x W^T + bias up to the roundings that the kernel makes."""
        expected = x.double() @ self.values.T
        largest = x.double().abs() @ self.magnitudes.T
        if bias is not None:
            expected += bias.double()
            largest += bias.double().abs()
        # Sums in float32. Few tokens: of 16 columns at a time two instructions and four operations, in one of 8 warps; of outliers in 16
        # threads. More: one instruction, perhaps in one warp; of outliers in 1 to 4; and dense weights are rounded to 16 bits.
        most = int(self.neutral.offsets.diff().max())
        few = len(x) <= 8
        roundings = 24 + x.shape[1] / 16 * (6 / 8 if few else 1) + (2 * most / 16 if few else most)
        bound = roundings * 2.0**-24 * largest + ROUNDING[x.dtype] * expected.abs() + 2.0**-25
        if not few:
            bound += x.double().abs() @ (ROUNDING[x.dtype] * self.dense.abs() + 2.0**-25).T
        assert y.dtype == x.dtype and y.shape == expected.shape
        error = (y.double() - expected).abs()
        assert (error <= bound).all(), (error / bound).max()


def activations(
    generator: torch.Generator, tokens: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def random_weight(
    generator: torch.Generator,
    shape: Shape,
    *,
    bits: int = 3,
    stats: tuple[int, int] = (3, 64),
    outliers: float = 0.02,
    dtype: torch.dtype = torch.float16,
    wide: bool = False,
) -> Weight:
    """`stats`: bits of codes of scales, rows that share lines; `outliers`: the share of them; `wide`: columns in int32."""
    (rows, columns, group_size), (stat_bits, stat_group_size) = shape, stats
    group_size = group_size or columns
    groups, blocks = -(-columns // group_size), -(-rows // stat_group_size)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0, 0], codes[-1, -1] = 0, (1 << bits) - 1
    stat_codes = torch.randint(
        1 << stat_bits, (rows, groups, 2), generator=generator, dtype=torch.uint8
    )
    parts = [
        random(blocks, groups) * 0.02 / (1 << stat_bits),
        random(blocks, groups) * 0.01 + 1e-3,
        random(blocks, groups) * 2 ** (bits - stat_bits),
        random(blocks, groups) * 2 ** (bits - 1),
    ]
    lines = torch.stack(parts, -1).to(dtype)
    chosen = random(rows, columns) < outliers
    values = (torch.randn(int(chosen.sum()), generator=generator) * 0.1).to(dtype)
    ends = chosen.sum(1).cumsum(0)
    neutral = SpqrGrid(
        qweight=bit_packing.pack(codes, bits).unsqueeze(-1),
        stat_codes=bit_packing.pack(stat_codes.flatten(1), stat_bits).unsqueeze(-1),
        stats=lines,
        offsets=torch.nn.functional.pad(ends, (1, 0)).int(),
        columns=chosen.nonzero()[:, 1].to(torch.int32 if wide else index_dtype(columns)),
        values=values,
        bits=bits,
        group_size=group_size,
        stat_bits=stat_bits,
        stat_group_size=stat_group_size,
        in_features=columns,
        out_features=rows,
    )
    of_rows = lines.double().repeat_interleave(stat_group_size, 0)[:rows]
    step, offset, zero_step, zero_offset = of_rows.unbind(-1)
    scaled, zero_scaled = stat_codes[..., 0] * step, stat_codes[..., 1] * zero_step
    by_column, middle = torch.arange(columns) // group_size, float(1 << (bits - 1))
    scale, zero = (offset + scaled)[:, by_column], (zero_offset + zero_scaled)[:, by_column]
    dense = (codes.double() - zero) * scale
    exact = dense.clone()
    exact[chosen] += values.double()
    largest_zero = middle + (zero_offset.abs() + zero_scaled.abs())[:, by_column]
    magnitudes = (codes.double() - middle).abs() + largest_zero
    magnitudes *= (offset.abs() + scaled.abs())[:, by_column]
    magnitudes[chosen] += values.double().abs()
    return Weight(neutral, prepared(neutral), exact, magnitudes, dense)


def prepared(grid: SpqrGrid) -> SpqrGrid:
    """In the layout of the kernel row."""
    return replace(
        grid,
        qweight=ROW.prepare(grid.qweight, grid.bits),
        stat_codes=ROW.prepare_stats(grid.stat_codes, grid.stat_bits),
    )
