"""`hfq.explain`: the kernel of every packed weight, and why no other one was taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ..nn.packed import PackedModule
from ..table import format_table, without_numbers, wrapped

__all__ = ["Explanation", "PackedWeight", "explain"]


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One packed weight and the kernel that multiplies with it.

    Attributes:
        name: module, with the parameter's name behind it where that is not "weight".
        format, bits, group_size: how it is stored; group_size -1 is a whole row.
        shape: `(N, K)` or `(E, N, K)`.
        device: type of the device it is on.
        kernel: the kernel that was chosen.
        refused: (kernel, reason) of those that stand before it in the order of preference.
        kernel_mode: how the kernel may treat activations; see `hfq.nn.packed.KERNEL_MODES`.
        activation: how the format has them quantized, in every mode: "dynamic", "static" or None.
    """

    name: str
    format: str
    bits: int
    group_size: int
    shape: tuple[int, ...]
    device: str
    kernel: str
    refused: tuple[tuple[str, str], ...]
    kernel_mode: str
    activation: str | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All packed weights of a model.

    Attributes:
        weights: in the order of the model.
        summary: one line: how many weights are packed, how many stay in float and why.
    """

    weights: tuple[PackedWeight, ...]
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``{"summary": ..., "weights": [...]}``."""
        return {"summary": self.summary, "weights": [asdict(weight) for weight in self.weights]}

    def table(self) -> str:
        """One row for all weights that differ in their layer's number only; reasons below."""
        groups = Counter(_group(weight) for weight in self.weights)
        notes: dict[tuple[str, str], int] = {}
        rows = []
        for weight, count in groups.items():
            marks = [notes.setdefault(refusal, len(notes) + 1) for refusal in weight.refused]
            shape = " x ".join(map(str, weight.shape))
            group = "row" if weight.group_size == -1 else str(weight.group_size)
            stored = f"{weight.format} {weight.activation}" if weight.activation else weight.format
            kernel = " ".join([weight.kernel, *(f"[{mark}]" for mark in marks)])
            rows.append([weight.name, str(count), stored, str(weight.bits), group, shape, kernel])
        header = ["weight", "count", "format", "bits", "group", "shape", "kernel"]
        lines = [format_table(header, rows)] if rows else []
        lines += [
            wrapped(f"[{mark}] not {kernel}: {reason}") for (kernel, reason), mark in notes.items()
        ]
        return "\n".join([*lines, self.summary])

    def __str__(self) -> str:
        return self.table()


def explain(model: nn.Module) -> Explanation:
    """Say for every packed weight of `model` which kernel runs it and why each better one was refused.

    Chooses the kernels that are not chosen yet, as the first forward would.
    """
    weights = tuple(_packed_weights(model))
    return Explanation(weights=weights, summary=_summary(model, weights))


def _packed_weights(model: nn.Module) -> Iterator[PackedWeight]:
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        for base, slot in module.slots.items():
            choice = module.kernel_choice(base)
            parts = [name, *([] if base == "weight" else [base])]
            yield PackedWeight(
                name=".".join(filter(None, parts)) or type(module).__name__,
                format=slot.format,
                bits=slot.spec.bits,
                group_size=slot.spec.group_size,
                shape=slot.float_shape,
                device=module.packed_parameters(base)["weight"].device.type,
                kernel=choice.row.name,
                refused=choice.refused,
                kernel_mode=module.kernel_mode,
                activation=slot.spec.activation,
            )


def _group(weight: PackedWeight) -> PackedWeight:
    """The weight with its layer's number blotted out: ``model.layers.*.mlp.up_proj``."""
    return replace(weight, name=without_numbers(weight.name))


def _summary(model: nn.Module, weights: tuple[PackedWeight, ...]) -> str:
    selection = getattr(getattr(model, "hf_quantizer", None), "selection", None)
    if selection is not None:
        # What `from_pretrained` decided, with its reasons.
        line: str = selection.summary()
        return line
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    kept = sum(not isinstance(module, PackedModule) for module in linears)
    line = f"quantized {len(weights)} of {len(weights) + kept} weights"
    return f"{line}; kept {kept} linear layers in float" if kept else line
