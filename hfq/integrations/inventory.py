"""What a quantized model consists of, for its card: bits, sizes, which weights are packed."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..evaluation.size import weight_size
from ..nn.packed import PackedModule
from ..nn.slot import PackedSlot
from ..table import format_bytes

__all__ = ["bits", "described", "module_table", "sizes"]


def bits(model: nn.Module) -> str:
    """Bits of the packed codes: ``4``, or ``4/8`` where weights differ."""
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    used = {slot.spec.bits for module in packed for slot in module.slots.values()}
    return "/".join(map(str, sorted(used)))


def sizes(model: nn.Module) -> dict[str, str]:
    """Sizes of the weights as text."""
    size = weight_size(model)
    return {
        "packed": format_bytes(size.packed_bytes),
        "kept": format_bytes(size.kept_bytes),
        "total": format_bytes(size.total_bytes),
        "bits_per_weight": f"{size.bits_per_weight:.2f}",
    }


def module_table(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Rows ``pattern``, ``count``, ``stored``: what is packed and how, what is not and why.

    Modules that differ by their number in the stack only share a row.
    """
    quantizer: Any = model.hf_quantizer
    stored: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            for base, slot in module.slots.items():
                stored[name if base == "weight" else f"{name}.{base}"] = described(slot)
        elif reason := quantizer.selection.kept.get(name):
            stored[name] = f"float: {reason}"
    stored |= {
        name: f"float: {reason}"
        for name, reason in quantizer.selection.kept.items()
        if name not in stored
    }
    counts = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), how) for name, how in stored.items()
    )
    return [
        {"pattern": pattern, "count": count, "stored": how}
        for (pattern, how), count in counts.items()
    ]


def described(slot: PackedSlot) -> str:
    """How a weight is stored: ``int, 4 bits, groups of 128, 4.12 bits per weight``."""
    size = slot.spec.group_size
    groups = "one group per row" if size == -1 else f"groups of {size}"
    return f"{slot.format}, {slot.spec.bits} bits, {groups}, {slot.bits_per_weight:.2f} bits per weight"
