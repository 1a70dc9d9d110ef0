"""Merging an adapter exactly: into the float weights that it was trained on.

An adapter on a packed base learns to correct the dequantized weights. Merged into the packed format, the sum is
rounded again: at 4 bits that costs 10 % of the output and more. Merged into float, nothing is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import WeightError
from ..nn.embedding import QuantEmbedding
from ..nn.experts import QuantExperts, unpack_experts_
from ..nn.linear import QuantLinear
from ..nn.packed import PackedModule

__all__ = ["merge_to_float"]


def merge_to_float(peft_model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every packed module of a model with adapters by a float one, in place.

    Outputs stay what they were, the adapters stay what they are, and ``peft_model.merge_and_unload()``, called
    afterwards, is exact up to the rounding of `dtype` and gives a plain float model.

    Args:
        peft_model: what `peft.get_peft_model` returned, or a model that adapters were added to. An unquantized
            model passes unchanged.
        dtype: of the float weights; by default that of the model.

    Raises:
        WeightError: an adapter is merged into a packed weight already, or cannot be merged into a transposed one.
    """
    packed = {name: m for name, m in peft_model.named_modules() if isinstance(m, PackedModule)}
    _refuse_merged(peft_model)
    model: Any = peft_model
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if getattr(model, "quantization_method", None) == "hfq":
        model.dequantize(dtype)
    else:
        _swap(peft_model, packed, dtype)
    for name in packed:
        peft_model.get_submodule(name).requires_grad_(False)
        _follow_transposition(peft_model, name)


def _refuse_merged(peft_model: nn.Module) -> None:
    for name, module in peft_model.named_modules():
        packed = isinstance(getattr(module, "base_layer", None), PackedModule)
        if packed and getattr(module, "merged", False):
            raise WeightError(
                f"{name}: expected adapters beside the packed weight, got one that is merged into it and was "
                "rounded with it: load base and adapter again and call merge_to_float before any merge"
            )


def _swap(model: nn.Module, packed: dict[str, PackedModule], dtype: torch.dtype | None) -> None:
    """Float twins for a model that was packed by hand; tied weights stay tied."""
    tied: dict[int, Any] = {}
    for name, module in packed.items():
        module.compute_dtype = dtype or module.compute_dtype
        if isinstance(module, QuantExperts):
            unpack_experts_(module)
            continue
        assert isinstance(module, (QuantLinear, QuantEmbedding))
        new = module.to_float()
        new.weight = tied.setdefault(id(module.packed_parameters("weight")["weight"]), new.weight)
        model.set_submodule(name, new)


def _follow_transposition(model: nn.Module, name: str) -> None:
    """Tell the adapter on a dequantized Conv1D that the weight is `[K, N]` now."""
    parent_name, _, attribute = name.rpartition(".")
    if attribute != "base_layer" or not isinstance(model.get_submodule(name), Conv1D):
        return
    adapter: Any = model.get_submodule(parent_name)
    if not hasattr(adapter, "fan_in_fan_out"):
        raise WeightError(
            f"{parent_name}: {type(adapter).__name__} cannot be merged into a Conv1D; merge it into the packed "
            "weight (merge_and_unload without merge_to_float) and dequantize the model then"
        )
    adapter.fan_in_fan_out = True
