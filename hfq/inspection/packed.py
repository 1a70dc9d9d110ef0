"""Packed weights as the headers of a checkpoint show them, compared with its quantization_config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..config import HfqConfig, Recipe
from ..core.bits import packed_bytes
from ..core.errors import CheckpointError
from ..core.spec import with_float_activations
from ..formats import TensorLayout, check_tensors
from ..nn.slot import PackedSlot
from .summary import StoredWeight, tensor_bytes

__all__ = ["Packed", "packed_weights"]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed weight and the names of its tensors."""

    stored: StoredWeight
    tensors: tuple[str, ...]


def packed_weights(tensors: Mapping[str, TensorLayout], config: HfqConfig) -> list[Packed]:
    """All packed weights; no packed tensor may be left over."""
    names = [
        name
        for name in tensors
        if f"{name}_scale" in tensors and tensors[name].dtype == torch.uint8
    ]
    packed = [_packed_weight(name, tensors, config) for name in names]
    claimed = {name for weight in packed for name in weight.tensors}
    for name, entry in tensors.items():
        base, marker, companion = name.rpartition(".weight_")
        if name in claimed:
            continue
        if entry.dtype == torch.uint8 and entry.shape[2:] and entry.shape[-1] == 1 and not marker:
            raise CheckpointError(
                f"{name}: packed codes without {name}_scale; the checkpoint is incomplete"
            )
        if companion == "scale" and f"{base}.weight" not in tensors:
            raise CheckpointError(
                f"{name}: the packed codes {base}.weight are missing; the checkpoint is incomplete"
            )
        if f"{base}.weight" in claimed:
            raise CheckpointError(f"{name}: the quantization_config of {base!r} has no such tensor")
    return packed


def _packed_weight(name: str, tensors: Mapping[str, TensorLayout], config: HfqConfig) -> Packed:
    module = name.removesuffix(".weight")
    recipe = config.recipe(module)
    if recipe is None:
        raise CheckpointError(
            f"{name} is packed, but the quantization_config keeps {module!r} in float"
        )
    if f"{name}_input_scale" not in tensors and _may_be_table(module, recipe, config):
        recipe = replace(recipe, spec=with_float_activations(recipe.spec))
    slot = _slot(module, tensors[name], tensors[f"{name}_scale"], recipe)
    stored = {name + key.removeprefix("weight"): key for key in slot.layout()}
    found = {key: tensors[full_name] for full_name, key in stored.items() if full_name in tensors}
    check_tensors(module, found, slot.layout())
    weight = StoredWeight(
        name=module,
        format=recipe.format,
        bits=recipe.spec.bits,
        group_size=recipe.spec.group_size,
        shape=slot.float_shape,
        bytes=sum(map(tensor_bytes, found.values())),
    )
    return Packed(stored=weight, tensors=tuple(stored))


def _may_be_table(module: str, recipe: Recipe, config: HfqConfig) -> bool:
    """Whether a weight with static activations may be an embedding, which reads none and has no scale for them.

    Headers do not tell embeddings from linear layers; they are packed on request only.
    """
    requested = config.quantize_embeddings or config.overridden(module)
    return recipe.spec.activation == "static" and requested


def _slot(module: str, codes: TensorLayout, scales: TensorLayout, recipe: Recipe) -> PackedSlot:
    """The place that these tensors fill.

    Rows of codes are padded to whole bytes, so K is known up to the last byte. The scales narrow it down, and the
    largest K of the rest is taken: it is exact where ``K * bits`` is a multiple of 8.
    """
    if len(codes.shape) not in (3, 4) or codes.shape[-1] != 1:
        raise CheckpointError(
            f"{module}: expected packed codes [N, B, 1] or [E, N, B, 1], got {codes.shape}"
        )
    *experts, out_features, row_bytes, _ = codes.shape
    largest = row_bytes * 8 // recipe.spec.bits
    slots = [
        PackedSlot(
            base="weight",
            format=recipe.format,
            spec=recipe.spec,
            out_features=out_features,
            in_features=in_features,
            experts=experts[0] if experts else None,
        )
        for in_features in range(largest, 0, -1)
        if packed_bytes(in_features, recipe.spec.bits) == row_bytes
    ]
    fitting = (slot for slot in slots if slot.layout()["weight_scale"].shape == scales.shape)
    return next(fitting, slots[0])
