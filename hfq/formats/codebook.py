"""Formats ``nf4`` and ``fp4``: 4-bit codes into a table of 16 values, one scale per group.

    weight               uint8 [N, ceil(K / 2), 1]      byte j = code[2j] | code[2j+1] << 4
    weight_scale         scale_dtype [N, G]             the group's largest magnitude

With ``double_quant`` the scales are 8-bit codes in blocks of 256 (along the flattened [N * G]):

    weight_scale         uint8 [N, G]
    weight_scale_step    float32 [ceil(N * G / 256)]
    weight_scale_offset  float32 [ceil(N * G / 256)]    scale = offset + code * step, rounded to scale_dtype

``w[n, k] = table[code[n, k]] * scale[n, k // group_size]``; tables in `hfq.core.codebooks`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import bits
from ..core.affine import decode_scales
from ..core.codebooks import CODEBOOKS, codebook
from ..core.errors import ConfigError
from ..core.spec import SCALE_BLOCK, CodebookSpec, QuantSpec, columns_per_group, group_count
from ..core.weight import PackedGrid, QuantizedWeight, ScaleCodes
from . import FORMATS, TensorLayout, chosen


class Codebook:
    """A 16-value table with a scale per group."""

    def __init__(self, name: str) -> None:
        self.name = name

    def spec(self, settings: Mapping[str, object]) -> CodebookSpec:
        names = ("bits", "sym", "group_size", "double_quant", "scale_dtype")
        given = chosen(settings, names, self.name)
        if given.pop("bits", 4) != 4:
            raise ConfigError(f"format {self.name!r} has 4 bits, got bits={settings['bits']!r}")
        if given.pop("sym", True) is not True:
            raise ConfigError(
                f"format {self.name!r} has no zero points, got sym={settings['sym']!r}; use format 'int'"
            )
        return CodebookSpec(codebook=self.name, **given)

    def layout(
        self, spec: QuantSpec, out_features: int, in_features: int
    ) -> dict[str, TensorLayout]:
        groups = (out_features, group_count(in_features, spec.group_size))
        stored = {
            "weight": TensorLayout(
                (out_features, bits.packed_bytes(in_features, 4), 1), torch.uint8
            )
        }
        if _double_quant(spec):
            blocks = (-(-groups[0] * groups[1] // SCALE_BLOCK),)
            stored["weight_scale"] = TensorLayout(groups, torch.uint8)
            stored["weight_scale_step"] = TensorLayout(blocks, torch.float32)
            stored["weight_scale_offset"] = TensorLayout(blocks, torch.float32)
        else:
            stored["weight_scale"] = TensorLayout(groups, spec.torch_scale_dtype)
        return stored

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = {"weight": bits.pack(weight.codes, 4).unsqueeze(-1)}
        if weight.scale_codes is None:
            tensors["weight_scale"] = weight.scales.contiguous()
        else:
            tensors["weight_scale"] = weight.scale_codes.codes.contiguous()
            tensors["weight_scale_step"] = weight.scale_codes.step
            tensors["weight_scale_offset"] = weight.scale_codes.offset
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, in_features: int
    ) -> QuantizedWeight:
        return QuantizedWeight(
            spec=spec,
            codes=bits.unpack(tensors["weight"].squeeze(-1), 4, in_features),
            scales=_scales(tensors, spec),
            scale_codes=_scale_codes(tensors) if _double_quant(spec) else None,
        )

    def grid(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> PackedGrid:
        return PackedGrid(
            qweight=tensors["weight"],
            scales=_scales(tensors, spec),
            zeros=None,
            codebook=codebook(self.name, tensors["weight"].device),
            g_idx=None,
            bits=4,
            group_size=columns_per_group(in_features, spec.group_size),
            in_features=in_features,
            out_features=out_features,
        )

    def check_values(self, tensors: Mapping[str, Tensor], in_features: int) -> None:
        """Every code stands for a value."""


def _double_quant(spec: QuantSpec) -> bool:
    return isinstance(spec, CodebookSpec) and spec.double_quant


def _scale_codes(tensors: Mapping[str, Tensor]) -> ScaleCodes:
    return ScaleCodes(
        codes=tensors["weight_scale"],
        step=tensors["weight_scale_step"],
        offset=tensors["weight_scale_offset"],
    )


def _scales(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
    if not _double_quant(spec):
        return tensors["weight_scale"]
    return decode_scales(_scale_codes(tensors), spec.torch_scale_dtype)


for _name in CODEBOOKS:
    FORMATS.register(_name, Codebook(_name))
