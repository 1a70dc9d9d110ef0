"""Packed layouts on disk, one file each.

A format says which tensors a quantized weight becomes and converts both ways without loss:

    layout(spec, N, K)  name -> shape and dtype
    pack(weight)        QuantizedWeight -> tensors
    unpack(tensors)     tensors -> QuantizedWeight
    grid(tensors)       tensors -> Grid, what kernels multiply with
    check_values        whether tensors of the right shapes hold what a kernel may rely on

Names start with ``weight``: the packed codes keep the name of the float weight, companions append to it
(``weight_scale``). The packed codes have one dimension more than the float weight, so a loader that does not
know the format meets a size mismatch instead of reading codes as numbers. The layout is the same on every
device; what a kernel likes better is made in memory (`hfq.kernels`) and never stored.

All tensors but `INPUT_SCALE` and `GROUP_INDEX` are cut along dimension 0 like the rows of the weight (`pack` of a slice
of rows whose count is a multiple of `ROW_CHUNK` is the slice of the pack), so a weight can be packed in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.errors import CheckpointError, ConfigError
from ..core.registry import Registry
from ..core.spec import SCALE_BLOCK, QuantSpec
from ..core.weight import Grid, QuantizedWeight

__all__ = [
    "FORMATS",
    "FORMAT_VERSION",
    "GROUP_INDEX",
    "INPUT_SCALE",
    "ROW_CHUNK",
    "Format",
    "TensorLayout",
    "check_tensors",
    "chosen",
    "stored_bytes",
]

# Raised when a checkpoint can no longer be read by older releases. Readers refuse newer versions.
FORMAT_VERSION = 1

# The tensors that are not cut along the rows: the scale of the activations, float32 [1], and the group of each column
# where groups are not runs of neighbours, int32 [K].
INPUT_SCALE = "weight_input_scale"
GROUP_INDEX = "weight_g_idx"

# Pieces of this many rows start on a boundary of every format's blocks.
ROW_CHUNK = SCALE_BLOCK


@dataclass(frozen=True)
class TensorLayout:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(Protocol):
    """One packed layout. `N` is out_features, `K` is in_features."""

    name: str

    def spec(self, settings: Mapping[str, object]) -> QuantSpec:
        """The spec that the user's settings (bits, group_size, sym, ...) describe; `ConfigError` if they do not fit."""

    def layout(
        self, spec: QuantSpec, out_features: int, in_features: int
    ) -> dict[str, TensorLayout]:
        """The stored tensors of an `[N, K]` weight."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of `weight`, contiguous, on its device."""

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, in_features: int
    ) -> QuantizedWeight:
        """The inverse of `pack`."""

    def grid(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> Grid:
        """The stored tensors as operands of a kernel: the tensors themselves, decoded only where they must be."""

    def check_values(self, tensors: Mapping[str, Tensor], in_features: int) -> None:
        """`CheckpointError` where values of tensors that fit the layout would lead a kernel astray (indices)."""


FORMATS: Registry[Format] = Registry("format", __name__)


def chosen(settings: Mapping[str, object], names: tuple[str, ...], format: str) -> dict[str, Any]:
    """The settings that were given; None means the format's default.

    Raises:
        ConfigError: a setting was given that is not one of `names`, those of `format`.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in names:
            raise ConfigError(
                f"format {format!r} has no setting {name!r}: expected some of {', '.join(names)}; "
                "leave it out or choose another format"
            )
    return given


def stored_bytes(format: str, spec: QuantSpec, shape: Sequence[int]) -> int:
    """Bytes of a weight `(N, K)`, or of a stack `(E, N, K)`, as a checkpoint has it, with scales and zero points."""
    *experts, rows, columns = shape
    layout = FORMATS.get(format).layout(spec, rows, columns).values()
    return math.prod(experts) * sum(
        math.prod(entry.shape) * entry.dtype.itemsize for entry in layout
    )


def check_tensors(
    name: str, tensors: Mapping[str, Tensor | TensorLayout], layout: Mapping[str, TensorLayout]
) -> None:
    """Compare stored tensors of the module `name` with their layout; `CheckpointError` where they differ."""
    for key, expected in layout.items():
        if key not in tensors:
            raise CheckpointError(
                f"{name}: the packed tensor {key!r} {expected.shape} is missing; the checkpoint is incomplete"
            )
        tensor = tensors[key]
        if tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
            raise CheckpointError(
                f"{name}: expected packed tensor {key!r} of shape {expected.shape} and {expected.dtype}, got "
                f"{tuple(tensor.shape)} and {tensor.dtype}; the checkpoint does not fit its quantization_config"
            )
