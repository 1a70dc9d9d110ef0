"""How much memory the weights of a model take, packed and not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ..nn.packed import PackedModule

__all__ = ["WeightSize", "weight_size"]


@dataclass(frozen=True, kw_only=True)
class WeightSize:
    """Sizes of the weights of one model; tensors that modules share count once.

    Attributes:
        packed_bytes: bytes of packed weights with their scales and zero points, as a checkpoint stores them.
        kept_bytes: bytes of the weights that stay in float (norms, biases, adapters, skipped modules).
        packed_weights, kept_weights: how many numbers they stand for.
    """

    packed_bytes: int
    kept_bytes: int
    packed_weights: int
    kept_weights: int

    @property
    def total_bytes(self) -> int:
        return self.packed_bytes + self.kept_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole model, scales and kept weights included; NaN without any weight."""
        weights = self.packed_weights + self.kept_weights
        return 8 * self.total_bytes / weights if weights else math.nan


def weight_size(model: nn.Module) -> WeightSize:
    """Add up the weights of `model`. Reads sizes only, so offloaded and meta weights count too."""
    packed: set[int] = set()
    packed_bytes = packed_weights = 0
    for module in model.modules():
        if not isinstance(module, PackedModule):
            continue
        for base, slot in module.slots.items():
            tensors = {id(parameter) for parameter in module.packed_parameters(base).values()}
            if tensors and not tensors & packed:
                layout = slot.layout().values()
                packed_bytes += sum(
                    math.prod(entry.shape) * entry.dtype.itemsize for entry in layout
                )
                packed_weights += math.prod(slot.float_shape)
            packed |= tensors
    kept = [parameter for parameter in model.parameters() if id(parameter) not in packed]
    return WeightSize(
        packed_bytes=packed_bytes,
        kept_bytes=sum(parameter.nbytes for parameter in kept),
        packed_weights=packed_weights,
        kept_weights=sum(parameter.numel() for parameter in kept),
    )
