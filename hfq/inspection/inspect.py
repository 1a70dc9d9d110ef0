"""`inspect_checkpoint`: read the headers of a folder and check that it is whole."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from ..config import HfqConfig
from .files import read_json, read_tensors
from .packed import packed_weights
from .summary import CheckpointSummary, tensor_bytes

__all__ = ["inspect_checkpoint"]


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSummary:
    """Read the headers of a checkpoint folder and check that it is whole.

    Raises:
        CheckpointError: no such folder, no config, files missing or cut off, packed tensors that do not fit.
        VersionError: the checkpoint was written by a newer hfq.
        ConfigError, UnknownNameError: the quantization_config holds what this hfq does not know.
    """
    path = Path(folder)
    config = read_json(path / "config.json")
    tensors = read_tensors(path)
    settings = config.get("quantization_config") or {}
    is_ours = settings.get("quant_method") == "hfq"
    packed = packed_weights(tensors, HfqConfig(**settings)) if is_ours else []
    claimed = {name for weight in packed for name in weight.tensors}
    kept = {name: entry for name, entry in tensors.items() if name not in claimed}
    numbers = sum(math.prod(weight.stored.shape) for weight in packed)
    numbers += sum(math.prod(entry.shape) for entry in kept.values())
    total = sum(map(tensor_bytes, tensors.values()))
    return CheckpointSummary(
        path=str(path),
        quantization=settings.get("quant_method"),
        metadata=_metadata(path, config, settings),
        packed=tuple(weight.stored for weight in packed),
        kept=kept,
        bits_per_weight=8 * total / numbers if numbers else math.nan,
    )


def _metadata(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the config says about origin and settings, and the base model from the card, if there is one."""
    card = _card(folder / "README.md")
    named = {key: card.get(key) for key in ("base_model", "base_model_revision", "license")}
    own = {key: config.get(key) for key in ("architectures", "dtype", "transformers_version")}
    facts = {**named, **own, "quantization_config": settings}
    return {key: value for key, value in facts.items() if value not in (None, [], {})}


def _card(path: Path) -> Mapping[str, Any]:
    """Metadata of the model card; empty where it is missing or damaged, which is no damage to the weights."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
