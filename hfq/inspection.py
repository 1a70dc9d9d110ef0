"""What a checkpoint folder holds, from the headers of its safetensors files and its JSON files alone.

No tensor is read and no pickle is ever opened. Damage raises `CheckpointError`: files that are missing or cut off,
packed weights without their companions, shapes that do not fit the quantization_config.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load

from .config import HfqConfig, Recipe
from .core.bits import packed_bytes
from .core.errors import CheckpointError
from .formats import TensorLayout, check_tensors
from .integrations.checkpoint import read_headers
from .nn.slot import PackedSlot
from .table import format_bytes, format_table

__all__ = ["CheckpointSummary", "StoredWeight", "inspect_checkpoint"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One packed weight of a checkpoint.

    Attributes:
        name: module, with the parameter's name behind it where that is not "weight".
        format, bits, group_size: how it is stored; group_size -1 is a whole row.
        shape: of the float weight, `(N, K)` or `(E, N, K)`.
        bytes: of the packed codes and their companions.
    """

    name: str
    format: str
    bits: int
    group_size: int
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """What `inspect_checkpoint` found.

    Attributes:
        path: the folder.
        quantization: "hfq", another quantizer's name, or None for a float checkpoint.
        metadata: architecture, versions and settings as config.json names them.
        packed: the packed weights; empty unless `quantization` is "hfq".
        kept: name -> shape and dtype of all other tensors.
        bits_per_weight: bits, over all numbers that the packed and the other tensors stand for.
    """

    path: str
    quantization: str | None
    metadata: Mapping[str, Any]
    packed: tuple[StoredWeight, ...]
    kept: Mapping[str, TensorLayout]
    bits_per_weight: float

    @property
    def packed_bytes(self) -> int:
        return sum(weight.bytes for weight in self.packed)

    @property
    def kept_bytes(self) -> int:
        return sum(map(_bytes, self.kept.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the fields by their names, `kept` in bytes, and the two sums."""
        return {
            "path": self.path,
            "quantization": self.quantization,
            "metadata": dict(self.metadata),
            "packed": [asdict(weight) for weight in self.packed],
            "kept": {name: _bytes(entry) for name, entry in self.kept.items()},
            "packed_bytes": self.packed_bytes,
            "kept_bytes": self.kept_bytes,
            "bits_per_weight": self.bits_per_weight,
        }

    def table(self) -> str:
        """One row for all tensors that differ in their layer's number only; totals and metadata below."""
        header = ["tensor", "count", "format", "bits", "group", "shape", "bytes"]
        total = self.packed_bytes + self.kept_bytes
        lines = [
            f"total {format_bytes(total)}: packed {format_bytes(self.packed_bytes)}, kept in float "
            f"{format_bytes(self.kept_bytes)}; {self.bits_per_weight:.2f} bits per weight",
            *(f"{key}: {_text(value)}" for key, value in self.metadata.items()),
        ]
        rows = [*_packed_rows(self.packed), *_kept_rows(self.kept)]
        return "\n".join([format_table(header, rows), *lines])

    def __str__(self) -> str:
        return self.table()


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSummary:
    """Read the headers of a checkpoint folder and check that it is whole.

    Raises:
        CheckpointError: no such folder, no config, files missing or cut off, packed tensors that do not fit.
        VersionError: the checkpoint was written by a newer hfq.
        ConfigError, UnknownNameError: the quantization_config holds what this hfq does not know.
    """
    path = Path(folder)
    config = _json(path / "config.json")
    tensors = _tensors(path)
    settings = config.get("quantization_config") or {}
    is_ours = settings.get("quant_method") == "hfq"
    packed = _packed_weights(tensors, HfqConfig(**settings)) if is_ours else []
    claimed = {name for weight in packed for name in weight.tensors}
    kept = {name: entry for name, entry in tensors.items() if name not in claimed}
    numbers = sum(math.prod(weight.stored.shape) for weight in packed)
    numbers += sum(math.prod(entry.shape) for entry in kept.values())
    total = sum(map(_bytes, tensors.values()))
    return CheckpointSummary(
        path=str(path),
        quantization=settings.get("quant_method"),
        metadata=_metadata(path, config, settings),
        packed=tuple(weight.stored for weight in packed),
        kept=kept,
        bits_per_weight=8 * total / numbers if numbers else math.nan,
    )


# ---- files


def _json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"expected a checkpoint folder, {path.parent} is none")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: this is not a complete checkpoint") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _tensors(folder: Path) -> dict[str, TensorLayout]:
    """All tensors of the checkpoint, compared with its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor an index of shards; hfq reads no other weights"
            )
        return read_headers([single])
    place = _json(index).get("weight_map")
    if not isinstance(place, dict):
        raise CheckpointError(f"{index}: expected an object 'weight_map'")
    found: dict[str, TensorLayout] = {}
    for shard in sorted(set(place.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"shard {shard} is missing in {folder}: download it again")
        present = read_headers([folder / shard])
        absent = [name for name, where in place.items() if where == shard and name not in present]
        if absent:
            raise CheckpointError(
                f"{shard} lacks {len(absent)} tensors of the index, such as {absent[0]!r}"
            )
        found |= present
    return found


# ---- packed weights


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """A packed weight and the names of its tensors."""

    stored: StoredWeight
    tensors: tuple[str, ...]


def _packed_weights(tensors: Mapping[str, TensorLayout], config: HfqConfig) -> list[_Packed]:
    """All packed weights; no packed tensor may be left over."""
    names = [
        name
        for name in tensors
        if f"{name}_scale" in tensors and tensors[name].dtype == torch.uint8
    ]
    packed = [_packed_weight(name, tensors, config) for name in names]
    claimed = {name for weight in packed for name in weight.tensors}
    for name, entry in tensors.items():
        base, _, companion = name.rpartition(".weight_")
        if name in claimed:
            continue
        if entry.dtype == torch.uint8 and not companion:
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


def _packed_weight(name: str, tensors: Mapping[str, TensorLayout], config: HfqConfig) -> _Packed:
    module = name.removesuffix(".weight")
    recipe = config.recipe(module)
    if recipe is None:
        raise CheckpointError(
            f"{name} is packed, but the quantization_config keeps {module!r} in float"
        )
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
        bytes=sum(map(_bytes, found.values())),
    )
    return _Packed(stored=weight, tensors=tuple(stored))


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


def _bytes(entry: TensorLayout) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


# ---- words


def _metadata(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the config says about origin and settings, and the base model from the card, if there is one."""
    card = _card(folder / "README.md")
    named = {key: card.get(key) for key in ("base_model", "base_model_revision", "license")}
    own = {key: config.get(key) for key in ("architectures", "dtype", "transformers_version")}
    return {
        key: value
        for key, value in {**named, **own, **settings}.items()
        if value not in (None, [], {})
    }


def _card(path: Path) -> Mapping[str, Any]:
    """Metadata of the model card; empty where it is missing or damaged, which is no damage to the weights."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _packed_rows(weights: tuple[StoredWeight, ...]) -> Iterator[list[str]]:
    groups: dict[StoredWeight, list[int]] = {}
    for weight in weights:
        key = replace(weight, name=_NUMBER.sub("*", weight.name))
        groups.setdefault(key, []).append(weight.bytes)
    for weight, sizes in groups.items():
        group = "row" if weight.group_size == -1 else str(weight.group_size)
        shape = " x ".join(map(str, weight.shape))
        columns = [weight.format, str(weight.bits), group, shape, format_bytes(sum(sizes))]
        yield [weight.name, str(len(sizes)), *columns]


def _kept_rows(kept: Mapping[str, TensorLayout]) -> Iterator[list[str]]:
    groups = Counter((_NUMBER.sub("*", name), entry) for name, entry in kept.items())
    for (name, entry), count in groups.items():
        dtype = str(entry.dtype).removeprefix("torch.")
        shape = " x ".join(map(str, entry.shape))
        size = format_bytes(count * _bytes(entry))
        yield [name, str(count), dtype, str(8 * entry.dtype.itemsize), "-", shape, size]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
