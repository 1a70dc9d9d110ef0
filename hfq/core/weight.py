"""A quantized weight as plain integers and scales: the truth that every packed layout must reproduce."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codebooks import codebook
from .spec import CodebookSpec, QuantSpec, group_count

__all__ = ["PackedGrid", "QuantizedWeight", "ScaleCodes", "expand_groups"]


@dataclass(frozen=True, kw_only=True)
class ScaleCodes:
    """Scales that are quantized themselves, in blocks of `SCALE_BLOCK` along the flattened `[N * G]`.

    Attributes:
        codes: uint8 `[N, G]`.
        step, offset: float32 `[ceil(N * G / SCALE_BLOCK)]`; scale = offset + code * step.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """Codes of one weight matrix `[N, K]` and the grid that gives them their values.

    Attributes:
        spec: what the numbers mean.
        codes: uint8 `[N, K]`, below ``spec.levels``.
        scales: `[N, G]` in ``spec.scale_dtype``.
        zeros: `[N, G]` in ``spec.scale_dtype`` for asymmetric integer grids, else None.
        g_idx: int32 `[K]`, the group of each column where groups are not runs of neighbours, else None.
        scale_codes: how `scales` are stored when ``spec.double_quant``; `scales` are their decoded values.
        input_scale: float32 `[1]`, the scale of the activations where ``spec.activation`` is "static". Methods leave
            it out: whoever calibrates adds it.
    """

    spec: QuantSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    g_idx: Tensor | None = None
    scale_codes: ScaleCodes | None = None
    input_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for: `[N, K]`, computed in float32."""
        in_features = self.codes.shape[-1]
        scales = expand_groups(self.scales.float(), self.spec.group_size, in_features, self.g_idx)
        if isinstance(self.spec, CodebookSpec):
            values = codebook(self.spec.codebook, self.codes.device)[self.codes.long()]
        elif self.zeros is None:
            values = self.codes.float() - self.spec.implied_zero
        else:
            zeros = expand_groups(self.zeros.float(), self.spec.group_size, in_features, self.g_idx)
            values = self.codes.float() - zeros
        return (values * scales).to(dtype)


@dataclass(frozen=True, kw_only=True)
class PackedGrid:
    """What a kernel multiplies with: packed codes and the tensors of a group-wise grid.

    Every format whose weight is ``table[code] * scale`` or ``(code - zero) * scale`` per group gives one.

    Attributes:
        qweight: uint8 packed codes, `[N, B, 1]` in the neutral layout (see `hfq.core.bits`).
        scales, zeros: float `[N, G]`; zeros None for a symmetric grid.
        codebook: float32 `[2**bits]`, or None for an integer grid.
        g_idx: int32 `[K]` or None.
        group_size: columns per group, K for one group per row.
        activation, input_scale: see `Int8Spec` and `QuantizedWeight`.
    """

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


def expand_groups(
    per_group: Tensor, group_size: int, in_features: int, g_idx: Tensor | None = None
) -> Tensor:
    """Repeat one value per group to one per column: `[..., N, G]` -> `[..., N, K]`."""
    if g_idx is not None:
        return per_group[..., g_idx.long()]
    if group_count(in_features, group_size) == 1:
        return per_group.expand(*per_group.shape[:-1], in_features)
    return per_group.repeat_interleave(group_size, dim=-1)[..., :in_features]
