"""The files of a checkpoint folder: its JSON files, and the headers of its weight files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError
from ..formats import TensorLayout
from ..integrations.checkpoint import read_headers

__all__ = ["read_json", "read_tensors"]


def read_json(path: Path) -> dict[str, Any]:
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


def read_tensors(folder: Path) -> dict[str, TensorLayout]:
    """All tensors of the checkpoint, compared with its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor an index of shards; hfq reads no other weights"
            )
        return read_headers([single])
    place = read_json(index).get("weight_map")
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
