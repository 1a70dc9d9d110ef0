"""Format ``fp8``: 8-bit floats (E4M3), one scale per output channel.

    weight              uint8 [N, K, 1]     the bytes of E4M3: sign, 4 bits of exponent, 3 of mantissa (hfq.core.float8)
    weight_scale        float32 [N, 1]      the row's largest magnitude / 448
    weight_input_scale  float32 [1]         only where activation="static"

``w[n, k] = value(code[n, k]) * scale[n]``. Codes are bytes and not a float8 tensor, which a loader that knows no hfq
would take for weights of a model in float8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import CheckpointError, ConfigError
from ..core.float8 import e4m3_table, has_nan
from ..core.spec import Fp8Spec, QuantSpec
from ..core.weight import Fp8Grid, QuantizedWeight
from . import FORMATS, INPUT_SCALE, TensorLayout, chosen


class Fp8:
    """E4M3 per output channel; activations in float or, with `activation`, in E4M3."""

    name = "fp8"

    def spec(self, settings: Mapping[str, object]) -> Fp8Spec:
        fixed = {
            name: getattr(Fp8Spec, name) for name in ("bits", "group_size", "sym", "scale_dtype")
        }
        given = chosen(settings, (*fixed, "activation"), self.name)
        for name, value in fixed.items():
            if given.pop(name, value) != value:
                raise ConfigError(
                    f"format 'fp8' stores 8-bit floats per output channel with float32 scales, got "
                    f"{name}={settings[name]!r}: expected {value!r}; leave it out, or use format 'int'"
                )
        return Fp8Spec(**given)

    def layout(
        self, spec: QuantSpec, out_features: int, in_features: int
    ) -> dict[str, TensorLayout]:
        stored = {
            "weight": TensorLayout((out_features, in_features, 1), torch.uint8),
            "weight_scale": TensorLayout((out_features, 1), torch.float32),
        }
        if spec.activation == "static":
            stored[INPUT_SCALE] = TensorLayout((1,), torch.float32)
        return stored

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = {
            "weight": weight.codes.unsqueeze(-1).contiguous(),
            "weight_scale": weight.scales.contiguous(),
        }
        if weight.input_scale is not None:
            tensors[INPUT_SCALE] = weight.input_scale
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, in_features: int
    ) -> QuantizedWeight:
        return QuantizedWeight(
            spec=spec,
            codes=tensors["weight"].squeeze(-1),
            scales=tensors["weight_scale"],
            input_scale=tensors.get(INPUT_SCALE),
        )

    def grid(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> Fp8Grid:
        return Fp8Grid(
            qweight=tensors["weight"],
            scales=tensors["weight_scale"],
            values=e4m3_table(tensors["weight"].device),
            in_features=in_features,
            out_features=out_features,
            activation=spec.activation,
            input_scale=tensors.get(INPUT_SCALE),
        )

    def check_values(self, tensors: Mapping[str, Tensor], in_features: int) -> None:
        """One pattern is NaN, which no weight becomes and which some kernels read as a number."""
        if has_nan(tensors["weight"]):
            raise CheckpointError(
                "expected 8-bit floats that are numbers, got NaN (bytes 127 or 255); the checkpoint is damaged"
            )


FORMATS.register("fp8", Fp8())
