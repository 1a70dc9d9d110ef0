"""Where a model comes from: its base model on the Hub, the commit, what the base's card says."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import ModelCard, hf_hub_download, metadata_load
from transformers import PreTrainedModel

__all__ = ["Origin", "origin_of", "with_license_of_base"]

logger = logging.getLogger(__name__)

# What a quantized model has in common with its base.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")

# ~/.cache/huggingface/hub/models--org--name/snapshots/0123abc
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Attributes:
    base_model: repository of the float model, None where it is not on the Hub or not known.
    revision: its commit hash.
    metadata: entries of its card that hold for a quantized copy, too.
    """

    base_model: str | None = None
    revision: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def origin_of(model: PreTrainedModel) -> Origin:
    """Read from the model's config and from files that are on this machine already."""
    path, quantizer = str(model.config._name_or_path), cast(Any, model.hf_quantizer)
    # Where Transformers names no commit, the cached files do.
    places = (path, os.path.realpath(path), *quantizer.checkpoint_files)
    repo, commit = _cached(*places) or (None, None)
    known = (
        _read(Path(path) / "README.md")
        if os.path.isdir(path)
        else _fetch(repo, commit, local_only=True)
    )
    if not quantizer.pre_quantized:
        known.setdefault("license", getattr(model.config, "license", None))
        return Origin(base_model=repo, revision=commit, metadata=_inherited(known, repo))
    # What was loaded is a quantized model itself; only its card can tell what it was made from.
    base, revision = known.get("base_model"), known.get("base_model_revision")
    if known.get("base_model_relation") != "quantized" or not isinstance(base, str):
        base = revision = None
    return Origin(base_model=base, revision=revision, metadata=_inherited(known, base))


def with_license_of_base(card: ModelCard) -> ModelCard:
    """Complete a card that names a base but no license, from the base's card if it can be had."""
    base = card.data.get("base_model")
    if card.data.get("license") or not isinstance(base, str):
        return card
    known = _fetch(base, card.data.get("base_model_revision"), local_only=False)
    missing = {
        key: value for key, value in _inherited(known, base).items() if not card.data.get(key)
    }
    for key, value in missing.items():
        card.data[key] = value
    return ModelCard(str(card)) if missing else card


def _cached(*paths: str) -> tuple[str, str] | None:
    """Repository and commit of files in the Hub's cache."""
    found = next(filter(None, map(_SNAPSHOT.search, paths)), None)
    return (found["repo"].replace("--", "/"), found["commit"]) if found else None


def _inherited(known: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    found = {key: known[key] for key in _INHERITED if known.get(key)}
    if found.get("license") != "other":
        return found
    # The Hub wants a name and a link for every license that it has no identifier for.
    found.setdefault("license_name", "license-of-the-base-model")
    link = str(found.get("license_link", ""))
    if base is not None and not link.startswith("http"):
        page = f"https://huggingface.co/{base}"
        found["license_link"] = f"{page}/blob/main/{link}" if link else page
    return found


def _fetch(repo: str | None, revision: str | None, *, local_only: bool) -> dict[str, Any]:
    """Metadata of the card in a repository; empty where it cannot be had."""
    if repo is None:
        return {}
    try:
        return _read(
            Path(hf_hub_download(repo, "README.md", revision=revision, local_files_only=local_only))
        )
    except (OSError, ValueError) as err:
        logger.info("the card of %s cannot be read, its license is not known: %s", repo, err)
        return {}


def _read(path: Path) -> dict[str, Any]:
    """Metadata of a card; empty where it is missing or damaged: somebody else wrote it."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
