"""Formats ``int`` and ``int8``: unsigned integer codes on a uniform grid.

    weight        uint8 [N, ceil(K * bits / 8), 1]   codes, a little-endian bit stream per row (hfq.core.bits)
    weight_scale  scale_dtype [N, G]
    weight_zero   scale_dtype [N, G]                 only where sym=False
    weight_g_idx  int32 [K]                          only where static_groups=False
    weight_input_scale  float32 [1]                  only where activation="static" (int8)

``w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]`` with g = k // group_size (or g_idx[k]) and
zero = 2**(bits-1) where none is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import bits
from ..core.errors import CheckpointError
from ..core.spec import Int8Spec, IntSpec, QuantSpec, columns_per_group, group_count
from ..core.weight import PackedGrid, QuantizedWeight
from . import FORMATS, GROUP_INDEX, INPUT_SCALE, TensorLayout, chosen

_SETTINGS = ("bits", "group_size", "sym", "scale_dtype")


class IntGrouped:
    """2 to 8 bits, symmetric or not, any group size."""

    name = "int"

    def spec(self, settings: Mapping[str, object]) -> IntSpec:
        return IntSpec(**chosen(settings, (*_SETTINGS, "static_groups"), self.name))

    def layout(
        self, spec: QuantSpec, out_features: int, in_features: int
    ) -> dict[str, TensorLayout]:
        groups = (out_features, group_count(in_features, spec.group_size))
        stored = {
            "weight": TensorLayout(
                (out_features, bits.packed_bytes(in_features, spec.bits), 1), torch.uint8
            ),
            "weight_scale": TensorLayout(groups, spec.torch_scale_dtype),
        }
        if not spec.sym:
            stored["weight_zero"] = TensorLayout(groups, spec.torch_scale_dtype)
        if not spec.static_groups:
            stored[GROUP_INDEX] = TensorLayout((in_features,), torch.int32)
        if spec.activation == "static":
            stored[INPUT_SCALE] = TensorLayout((1,), torch.float32)
        return stored

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = {
            "weight": bits.pack(weight.codes, weight.spec.bits).unsqueeze(-1),
            "weight_scale": weight.scales.contiguous(),
        }
        if weight.zeros is not None:
            tensors["weight_zero"] = weight.zeros.contiguous()
        if not weight.spec.static_groups:
            tensors[GROUP_INDEX] = _group_index(weight)
        if weight.input_scale is not None:
            tensors[INPUT_SCALE] = weight.input_scale
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, in_features: int
    ) -> QuantizedWeight:
        return QuantizedWeight(
            spec=spec,
            codes=bits.unpack(tensors["weight"].squeeze(-1), spec.bits, in_features),
            scales=tensors["weight_scale"],
            zeros=tensors.get("weight_zero"),
            g_idx=tensors.get(GROUP_INDEX),
            input_scale=tensors.get(INPUT_SCALE),
        )

    def grid(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> PackedGrid:
        return PackedGrid(
            qweight=tensors["weight"],
            scales=tensors["weight_scale"],
            zeros=tensors.get("weight_zero"),
            codebook=None,
            g_idx=tensors.get(GROUP_INDEX),
            bits=spec.bits,
            group_size=columns_per_group(in_features, spec.group_size),
            in_features=in_features,
            out_features=out_features,
            activation=spec.activation,
            input_scale=tensors.get(INPUT_SCALE),
        )

    def check_values(self, tensors: Mapping[str, Tensor], in_features: int) -> None:
        """Every code stands for a value, but a column may name a group that is none."""
        groups = tensors.get(GROUP_INDEX)
        if groups is None or not groups.numel():
            return
        least, most = (int(extreme) for extreme in groups.aminmax())
        count = tensors["weight_scale"].shape[-1]
        if least < 0 or most >= count:
            raise CheckpointError(
                f"expected groups from 0 to {count - 1} for the columns, got {least} to {most}; the checkpoint is "
                "damaged"
            )


def _group_index(weight: QuantizedWeight) -> Tensor:
    """Int32 `[K]`; methods that make groups of neighbours do not number them."""
    if weight.g_idx is not None:
        return weight.g_idx.contiguous()
    columns = torch.arange(weight.codes.shape[1], dtype=torch.int32, device=weight.codes.device)
    return columns // columns_per_group(len(columns), weight.spec.group_size)


class Int8PerChannel(IntGrouped):
    """8 bits per output channel, float32 scales; activations in float or, with `activation`, in int8."""

    name = "int8"

    def spec(self, settings: Mapping[str, object]) -> Int8Spec:
        return Int8Spec(**chosen(settings, (*_SETTINGS, "activation"), self.name))


FORMATS.register("int", IntGrouped())
FORMATS.register("int8", Int8PerChannel())
