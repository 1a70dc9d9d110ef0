"""A quantized weight as plain integers and scales: the truth that every packed layout must reproduce.

`QuantizedWeight` is that truth; a `Grid` is what kernels multiply with, one class for each family of layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .codebooks import codebook
from .float8 import e4m3_values
from .spec import CodebookSpec, Fp8Spec, QuantSpec, group_count

__all__ = [
    "Fp8Grid",
    "Grid",
    "Outliers",
    "PackedGrid",
    "QuantizedWeight",
    "ScaleCodes",
    "SpqrGrid",
    "expand_groups",
    "index_dtype",
]


@dataclass(frozen=True, kw_only=True)
class ScaleCodes:
    """Scales that are quantized themselves: scale = offset + code * step.

    Attributes:
        codes: uint8 `[N, G]`.
        step, offset: double quantization: float32 `[ceil(N * G / SCALE_BLOCK)]`, for blocks along the flattened
            `[N * G]`. SpQR: ``spec.torch_stat_dtype`` `[ceil(N / stat_group_size), G]`, for blocks of rows.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Weights that the grid serves badly, row by row, columns ascending within a row.

    Attributes:
        counts: how many each row has, `[N]`; adds up to Z.
        columns: `[Z]`; both in `index_dtype`.
        values: what to add to the dense weight there, ``spec.torch_stat_dtype`` `[Z]`. Differences, not weights: a
            kernel adds two products, and a difference is small, so that its own rounding is.
    """

    counts: Tensor
    columns: Tensor
    values: Tensor

    def add_to(self, weight: Tensor) -> None:
        """Add the outliers to a dense float weight `[N, K]`, in place."""
        rows = torch.arange(weight.shape[0], device=weight.device)
        rows = rows.repeat_interleave(self.counts.long(), output_size=self.columns.shape[0])
        at = (rows, self.columns.long())
        weight.index_put_(at, self.values.to(weight.dtype), accumulate=True)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """Codes of one weight matrix `[N, K]` and the grid that gives them their values.

    Attributes:
        spec: what the numbers mean.
        codes: uint8 `[N, K]`, below ``spec.levels``.
        scales: `[N, G]` in ``spec.scale_dtype``.
        zeros: `[N, G]` in ``spec.scale_dtype`` for asymmetric integer grids, else None.
        g_idx: int32 `[K]`, the group of each column where groups are not runs of neighbours, else None.
        scale_codes: how `scales` are stored where they are quantized themselves; `scales` are their decoded values.
        zero_codes: likewise for `zeros`.
        outliers: what is stored beside the grid, else None.
        input_scale: float32 `[1]`, the scale of the activations where ``spec.activation`` is "static". Methods leave
            it out: whoever calibrates adds it.
    """

    spec: QuantSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    g_idx: Tensor | None = None
    scale_codes: ScaleCodes | None = None
    zero_codes: ScaleCodes | None = None
    outliers: Outliers | None = None
    input_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for: `[N, K]`, computed in float32."""
        in_features = self.codes.shape[-1]
        scales = expand_groups(self.scales.float(), self.spec.group_size, in_features, self.g_idx)
        if isinstance(self.spec, CodebookSpec):
            values = codebook(self.spec.codebook, self.codes.device)[self.codes.long()]
        elif isinstance(self.spec, Fp8Spec):
            values = e4m3_values(self.codes)
        elif self.zeros is None:
            values = self.codes.float() - self.spec.implied_zero
        else:
            zeros = expand_groups(self.zeros.float(), self.spec.group_size, in_features, self.g_idx)
            values = self.codes.float() - zeros
        values = values * scales
        if self.outliers is not None:
            self.outliers.add_to(values)
        return values.to(dtype)


@dataclass(frozen=True, kw_only=True)
class PackedGrid:
    """What a kernel multiplies with: packed codes and the tensors of a group-wise grid.

    Every format whose weight is ``table[code] * scale`` or ``(code - zero) * scale`` per group gives one.

    Attributes:
        OPERANDS: keys of the format's tensors that kernels read as they are -> the fields that hold them.
        qweight: uint8 packed codes, `[N, B, 1]` in the neutral layout (see `hfq.core.bits`).
        scales, zeros: float `[N, G]`; zeros None for a symmetric grid.
        codebook: float32 `[2**bits]`, or None for an integer grid.
        g_idx: int32 `[K]` or None.
        group_size: columns per group, K for one group per row.
        activation, input_scale: see `Int8Spec` and `QuantizedWeight`.
    """

    OPERANDS: ClassVar[Mapping[str, str]] = {
        "weight": "qweight",
        "weight_scale": "scales",
        "weight_zero": "zeros",
    }

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    codebook: Tensor | None
    g_idx: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int
    activation: str | None = None
    input_scale: Tensor | None = None

    def expert(self, index: int) -> PackedGrid:
        """One weight out of a stack: every tensor `[E, ...]` becomes its slice `[...]`."""
        return replace(
            self,
            qweight=self.qweight[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
            g_idx=None if self.g_idx is None else self.g_idx[index],
            input_scale=None if self.input_scale is None else self.input_scale[index],
        )


@dataclass(frozen=True, kw_only=True)
class Fp8Grid:
    """What a kernel multiplies with where weights are 8-bit floats; see `Fp8Spec`.

    Attributes:
        qweight: uint8 `[N, K, 1]`, the bytes of E4M3 (`hfq.core.float8`).
        scales: float32 `[N, 1]`.
        values: float32 `[256]`, what the bytes stand for (`e4m3_table`).
        activation, input_scale: see `Fp8Spec` and `QuantizedWeight`.
        group_size: K.
    """

    OPERANDS: ClassVar[Mapping[str, str]] = {"weight": "qweight", "weight_scale": "scales"}

    qweight: Tensor
    scales: Tensor
    values: Tensor
    in_features: int
    out_features: int
    activation: str | None = None
    input_scale: Tensor | None = None
    bits: ClassVar[int] = 8

    @property
    def group_size(self) -> int:
        return max(1, self.in_features)

    def expert(self, index: int) -> Fp8Grid:
        """One weight out of a stack: every tensor `[E, ...]` becomes its slice `[...]`."""
        return replace(
            self,
            qweight=self.qweight[index],
            scales=self.scales[index],
            input_scale=None if self.input_scale is None else self.input_scale[index],
        )


@dataclass(frozen=True, kw_only=True)
class SpqrGrid:
    """What a kernel multiplies with where scales are bilevel and outliers stand beside the grid; see `SpqrSpec`.

    Attributes:
        qweight: uint8 packed codes, `[N, B, 1]` in the neutral layout (see `hfq.core.bits`).
        stat_codes: uint8 `[N, S, 1]`, the codes of each group's scale and zero point in turn, packed like `qweight`.
        stats: float `[ceil(N / stat_group_size), G, 4]`: step and offset of the scales, step and offset of the zeros.
        offsets: int32 `[N + 1]`: row n has the outliers ``offsets[n]`` to ``offsets[n + 1]``.
        columns: int16 or int32 `[Z]`, ascending within a row.
        values: float `[Z]`, added to the dense weight.
        group_size: columns per group, K for one group per row.
    """

    OPERANDS: ClassVar[Mapping[str, str]] = {
        "weight": "qweight",
        "weight_scale": "stat_codes",
        "weight_scale_stat": "stats",
        "weight_outlier_column": "columns",
        "weight_outlier": "values",
    }

    qweight: Tensor
    stat_codes: Tensor
    stats: Tensor
    offsets: Tensor
    columns: Tensor
    values: Tensor
    bits: int
    group_size: int
    stat_bits: int
    stat_group_size: int
    in_features: int
    out_features: int

    def expert(self, index: int) -> SpqrGrid:
        """One weight out of a stack: every tensor `[E, ...]` becomes its slice `[...]`."""
        return replace(
            self,
            qweight=self.qweight[index],
            stat_codes=self.stat_codes[index],
            stats=self.stats[index],
            offsets=self.offsets[index],
            columns=self.columns[index],
            values=self.values[index],
        )


Grid = PackedGrid | Fp8Grid | SpqrGrid


def index_dtype(in_features: int) -> torch.dtype:
    """The smallest integers that hold a column, and a count of columns."""
    return torch.int16 if in_features < 1 << 15 else torch.int32


def expand_groups(
    per_group: Tensor, group_size: int, in_features: int, g_idx: Tensor | None = None
) -> Tensor:
    """Repeat one value per group to one per column: `[..., N, G]` -> `[..., N, K]`."""
    if g_idx is not None:
        return per_group[..., g_idx.long()]
    if group_count(in_features, group_size) == 1:
        return per_group.expand(*per_group.shape[:-1], in_features)
    return per_group.repeat_interleave(group_size, dim=-1)[..., :in_features]
