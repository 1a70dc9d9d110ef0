"""What became of each tensor of a float checkpoint: `hfq_manifest.json`, and the proof that none was lost or made up.

    source tensor -> float parameter of the model (several where experts are merged) -> tensors of the written checkpoint

The first arrow is the one that loading takes, the second the one that saving takes; files, shapes and dtypes are read
from the headers on both sides.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..formats import TensorLayout
from ..nn.packed import PackedModule
from .checkpoint import read_headers
from .inventory import described

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "MANIFEST",
    "Manifest",
    "Output",
    "Source",
    "check_sources",
    "dropped_sources",
    "manifest",
]

MANIFEST = "hfq_manifest.json"

_OURS = "Nothing was kept. Please report this model"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One tensor of the float checkpoint.

    Attributes:
        file: name of its file.
        shape, dtype: as stored.
        outputs: tensors of the written checkpoint that it became, or became a part of.
        dropped: why there are none; empty otherwise.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    outputs: tuple[str, ...] = ()
    dropped: str = ""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor of the written checkpoint.

    Attributes:
        file: name of its file.
        shape, dtype: as stored.
        format: how the weight that it belongs to is stored (`hfq.integrations.inventory.described`); empty for float tensors.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    format: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Both sides, by name."""

    sources: Mapping[str, Source]
    outputs: Mapping[str, Output]

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def dropped_sources(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Those that the architecture says it does not need -> why.

    Args:
        names: of tensors that became no parameter.
    """
    # The loader's own rule: patterns of the architecture, and buffers that were stored once.
    left: Any = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    every = set(left.unexpected_keys)
    model._adjust_missing_and_unexpected_keys(left)
    return {
        name: f"{type(model).__name__} does not use it" for name in every - left.unexpected_keys
    }


def check_sources(
    model: PreTrainedModel, headers: Mapping[str, TensorLayout], parameters: Mapping[str, str]
) -> None:
    """Every tensor must become one parameter, or a part of one, and every parameter be made of tensors of its size.

    Args:
        model: the float skeleton.
        headers: of the float checkpoint.
        parameters: name in the checkpoint -> parameter.

    Raises:
        CheckpointError: a tensor is left over, or a parameter gets too much or too little.
    """
    left = headers.keys() - parameters.keys()
    unknown = left - dropped_sources(model, left).keys()
    if unknown:
        raise CheckpointError(
            f"the checkpoint has {len(unknown)} tensors that {type(model).__name__} has no parameter for, such as "
            f"{min(unknown)}: quantizing would lose them. Is it a checkpoint of another kind of model?"
        )
    parts: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        parts.setdefault(parameter, []).append(name)
    expected = model.state_dict()
    for parameter, names in parts.items():
        found = sum(math.prod(headers[name].shape) for name in names)
        if found != expected[parameter].numel():
            raise CheckpointError(
                f"{parameter}: expected {expected[parameter].numel()} numbers, got {found} in {', '.join(sorted(names))}: "
                "the checkpoint has a tensor twice, lacks one, or is of another kind of model"
            )


def manifest(
    model: PreTrainedModel,
    source_files: Iterable[str | Path],
    parameters: Mapping[str, str],
    names_for_saving: Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Tensor]],
    written_files: Iterable[str | Path],
) -> Manifest:
    """Both sides of one run.

    Args:
        model: quantized; its weights may be on meta.
        parameters: name in the float checkpoint -> float parameter.
        names_for_saving: from names in the model to those in a checkpoint.

    Raises:
        CheckpointError: a source tensor led nowhere, or a written tensor has none.
    """
    wanted, formats = _written_names(model, names_for_saving)
    tied = dict(model.all_tied_weights_keys)
    sources: dict[str, Source] = {}
    for file, layouts in _by_file(source_files):
        dropped = dropped_sources(model, layouts.keys() - parameters.keys())
        for name, layout in layouts.items():
            parameter = parameters.get(name, "")
            outputs = wanted.get(parameter, ())
            if not outputs and (owner := _owner(parameter, model, tied)):
                dropped[name] = f"tied to {owner}"
            sources[name] = Source(
                file=file,
                shape=layout.shape,
                dtype=_dtype(layout),
                outputs=outputs,
                dropped=dropped.get(name, ""),
            )
    outputs_found = {
        name: Output(
            file=file, shape=layout.shape, dtype=_dtype(layout), format=formats.get(name, "")
        )
        for file, layouts in _by_file(written_files)
        for name, layout in layouts.items()
    }
    _check(sources, outputs_found)
    return Manifest(
        sources=dict(sorted(sources.items())), outputs=dict(sorted(outputs_found.items()))
    )


def _check(sources: Mapping[str, Source], outputs: Mapping[str, Output]) -> None:
    made: set[str] = set()
    for name, source in sources.items():
        if bool(source.outputs) == bool(source.dropped):
            raise CheckpointError(f"{name}: it became no tensor of what was written. {_OURS}")
        lost = [output for output in source.outputs if output not in outputs]
        if lost:
            raise CheckpointError(f"{name}: its {', '.join(lost)} was not written. {_OURS}")
        made.update(source.outputs)
    without = outputs.keys() - made
    if without:
        raise CheckpointError(
            f"{min(without)}: it was written and comes from no tensor of the float checkpoint. {_OURS}"
        )


def _written_names(
    model: PreTrainedModel,
    names_for_saving: Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Tensor]],
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Float parameter -> names of its tensors in the written checkpoint; such a name -> its format."""
    inside: dict[str, tuple[str, str]] = {}  # name in the model -> float parameter, format
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        slots = module.slots if isinstance(module, PackedModule) else {}
        for base, slot in slots.items():
            for key in slot.layout():
                inside[prefix + slot.attribute(key)] = f"{prefix}{base}", described(slot)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                inside.setdefault(prefix + key, (prefix + key, ""))
    for each in model.all_tied_weights_keys:
        inside.pop(each, None)
    order = list(inside)
    # Saving only renames here, so a number that travels under a name tells where that name arrives.
    sent = {name: torch.tensor(index) for index, name in enumerate(order)}
    names: dict[str, list[str]] = {}
    formats: dict[str, str] = {}
    for saved, number in names_for_saving(model, sent).items():
        parameter, kind = inside[order[int(number)]]
        names.setdefault(parameter, []).append(saved)
        if kind:
            formats[saved] = kind
    return {parameter: tuple(found) for parameter, found in names.items()}, formats


def _owner(parameter: str, model: PreTrainedModel, tied: Mapping[str, str]) -> str:
    """What a parameter is tied to; packed ones are tied tensor by tensor."""
    if parameter in tied:
        return tied[parameter]
    module, _, base = parameter.rpartition(".")
    packed = model.get_submodule(module) if module else None
    if isinstance(packed, PackedModule) and base in packed.slots:
        slot = packed.slots[base]
        owners = {tied.get(f"{module}.{slot.attribute(key)}", "") for key in slot.layout()}
        return ", ".join(sorted(owners - {""}))
    return ""


def _by_file(files: Iterable[str | Path]) -> Iterable[tuple[str, dict[str, TensorLayout]]]:
    for file in files:
        yield os.path.basename(file), read_headers([file])


def _dtype(layout: TensorLayout) -> str:
    return str(layout.dtype).removeprefix("torch.")
