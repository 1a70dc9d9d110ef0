"""The place of one packed weight in a module: its format, its sizes, the names of its tensors.

    float weight            in memory (parameters of the module)       in a checkpoint
    linear.weight [N, K]    qweight, weight_scale, weight_zero, ...    weight, weight_scale, weight_zero, ...
    experts.up_proj         up_proj, up_proj_scale, ...                up_proj, up_proj_scale, ...

In memory a Linear's codes are called ``qweight`` because ``weight`` is what users of an `nn.Linear` read: the
virtual float weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.spec import QuantSpec
from ..formats import FORMATS, TensorLayout

__all__ = ["PackedSlot"]


@dataclass(frozen=True, kw_only=True)
class PackedSlot:
    """One packed weight `[N, K]`, or a stack of them `[E, N, K]`.

    Attributes:
        base: the float parameter that it replaces ("weight", "gate_up_proj").
        format: registered name of the packed layout.
        spec: what is stored.
        experts: E, or None for a single matrix.
        transposed: the float parameter is `[K, N]` (Conv1D) or `[E, K, N]` (gpt-oss); packed it is `[N, K]`.
    """

    base: str
    format: str
    spec: QuantSpec
    out_features: int
    in_features: int
    experts: int | None = None
    transposed: bool = False

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Shape of the weight as the kernels see it: `[N, K]` or `[E, N, K]`."""
        shape = (self.out_features, self.in_features)
        return shape if self.experts is None else (self.experts, *shape)

    @property
    def stack_dims(self) -> int:
        """Leading dimensions of every tensor: 1 for a stack of experts, else 0."""
        return 0 if self.experts is None else 1

    def layout(self) -> dict[str, TensorLayout]:
        """Neutral layout by key ("weight", "weight_scale", ...)."""
        single = FORMATS.get(self.format).layout(self.spec, self.out_features, self.in_features)
        if self.experts is None:
            return single
        return {
            key: TensorLayout((self.experts, *entry.shape), entry.dtype)
            for key, entry in single.items()
        }

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all that is stored: codes, scales, outliers; NaN for an empty weight."""
        stored = (math.prod(entry.shape) * entry.dtype.itemsize for entry in self.layout().values())
        weights = math.prod(self.float_shape)
        return 8 * sum(stored) / weights if weights else math.nan

    def attribute(self, key: str) -> str:
        """Name of the module's parameter that holds the tensor `key`."""
        return "qweight" if self.base == "weight" and key == "weight" else self.stored_name(key)

    def stored_name(self, key: str) -> str:
        """Name of the tensor `key` in a checkpoint, relative to the module."""
        return self.base + key.removeprefix("weight")
