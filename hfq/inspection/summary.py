"""What is in a checkpoint, as data and as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..formats import TensorLayout
from ..table import format_bytes, format_table, without_numbers, wrapped

__all__ = ["CheckpointSummary", "StoredWeight", "tensor_bytes"]


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
        return sum(map(tensor_bytes, self.kept.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the fields by their names, `kept` in bytes, and the two sums."""
        return {
            "path": self.path,
            "quantization": self.quantization,
            "metadata": dict(self.metadata),
            "packed": [asdict(weight) for weight in self.packed],
            "kept": {name: tensor_bytes(entry) for name, entry in self.kept.items()},
            "packed_bytes": self.packed_bytes,
            "kept_bytes": self.kept_bytes,
            "bits_per_weight": self.bits_per_weight,
        }

    def table(self) -> str:
        """One row for all tensors that differ in their layer's number only; totals and metadata below."""
        header = ["tensor", "count", "format", "bits", "group", "shape", "bytes"]
        total = self.packed_bytes + self.kept_bytes
        totals = (
            f"total {format_bytes(total)}: packed {format_bytes(self.packed_bytes)}, kept in float "
            f"{format_bytes(self.kept_bytes)}; {self.bits_per_weight:.2f} bits per weight"
        )
        rows = [*_packed_rows(self.packed), *_kept_rows(self.kept)]
        facts = [wrapped(f"{key}: {_words(value)}") for key, value in self.metadata.items()]
        return "\n".join([format_table(header, rows), totals, *facts])

    def __str__(self) -> str:
        return self.table()


def tensor_bytes(entry: TensorLayout) -> int:
    """Bytes of one stored tensor."""
    return math.prod(entry.shape) * entry.dtype.itemsize


def _packed_rows(weights: tuple[StoredWeight, ...]) -> Iterator[list[str]]:
    groups: dict[StoredWeight, list[int]] = {}
    for weight in weights:
        key = replace(weight, name=without_numbers(weight.name))
        groups.setdefault(key, []).append(weight.bytes)
    for weight, sizes in groups.items():
        group = "row" if weight.group_size == -1 else str(weight.group_size)
        shape = " x ".join(map(str, weight.shape))
        columns = [weight.format, str(weight.bits), group, shape, format_bytes(sum(sizes))]
        yield [weight.name, str(len(sizes)), *columns]


def _kept_rows(kept: Mapping[str, TensorLayout]) -> Iterator[list[str]]:
    groups = Counter((without_numbers(name), entry) for name, entry in kept.items())
    for (name, entry), count in groups.items():
        dtype = str(entry.dtype).removeprefix("torch.")
        shape = " x ".join(map(str, entry.shape))
        size = format_bytes(count * tensor_bytes(entry))
        yield [name, str(count), dtype, str(8 * entry.dtype.itemsize), "-", shape, size]


def _words(value: object) -> str:
    """A JSON value as text, settings that say nothing left out."""
    if isinstance(value, Mapping):
        chosen = {name: setting for name, setting in value.items() if setting not in (None, [], {})}
        return ", ".join(f"{name}={setting}" for name, setting in chosen.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
