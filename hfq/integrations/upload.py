"""Uploading a folder to the Hub: one commit, safe to repeat.

`huggingface_hub` asks the Hub which large files it has, by their hashes, and sends the others; so a
push that broke continues where it stopped. It retries each request by itself, with growing pauses.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..core.errors import CheckpointError, HfqError
from .card import CARD, is_ours, renamed
from .checkpoint import read_headers
from .origin import with_license_of_base
from .staging import stale_weights

__all__ = ["Destination", "PushError", "check_complete", "upload"]

# Connection errors: httpx.HTTPError with huggingface_hub 1, httpx2.HTTPError with 2.
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])


class PushError(HfqError, RuntimeError):
    """A model could not be uploaded; the repository shows what it showed before."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where to and how; the meanings are those of `huggingface_hub.HfApi.create_commit`.

    Attributes:
        tags: added to those of the card.
    """

    repo_id: str
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None
    tags: Sequence[str] | str | None = None


def check_complete(folder: Path, files: Collection[str]) -> None:
    """Refuse to publish what nobody could load.

    Raises:
        CheckpointError: no config, no weights, a missing shard or a truncated one.
    """
    weights = [name for name in files if name.endswith(".safetensors")]
    if "config.json" not in files or not weights:
        raise CheckpointError(
            f"{folder}: expected a saved model (config.json and *.safetensors), "
            f"found {', '.join(files) or 'nothing'}; give the folder that save_pretrained wrote"
        )
    for index in (name for name in files if name.startswith("model.safetensors.index.")):
        shards = set(
            json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        )
        if missing := sorted(shards.difference(files)):
            raise CheckpointError(
                f"{folder}: {index} names {', '.join(missing)}, not in the folder; save again"
            )
    read_headers(folder / name for name in weights)


def upload(folder: Path, files: Collection[str], to: Destination) -> CommitInfo:
    """Commit `files` of `folder` (relative POSIX paths) to a repository, created if need be.

    Raises:
        PushError: the Hub refused, or the connection broke.
    """
    api = HfApi(token=to.token)
    try:
        repo_id = api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
        if to.revision and not to.create_pr and not to.revision.startswith("refs/"):
            api.create_branch(repo_id, branch=to.revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=to.revision)
        added = [CommitOperationAdd(name, folder / name) for name in files if name != CARD]
        removed = [CommitOperationDelete(name) for name in stale_weights(present, files)]
        return api.create_commit(
            repo_id,
            [*_card(api, repo_id, folder, files, present, to), *added, *removed],
            commit_message=to.commit_message or "Upload model quantized by hfq",
            commit_description=to.commit_description,
            revision=to.revision,
            create_pr=to.create_pr,
        )
    except (OSError, RuntimeError, ValueError, _HTTP_ERROR) as err:
        raise PushError(_message(folder, to, err)) from err


def _card(
    api: HfApi,
    repo_id: str,
    folder: Path,
    files: Collection[str],
    present: Collection[str],
    to: Destination,
) -> list[CommitOperationAdd]:
    """The card's part of the commit; nothing where the repository's own card stays as it is."""
    text = (folder / CARD).read_text(encoding="utf-8") if CARD in files else None
    theirs = None
    if CARD in present:
        theirs = Path(api.hf_hub_download(repo_id, CARD, revision=to.revision)).read_text(
            encoding="utf-8"
        )
    if text is None or (theirs is not None and is_ours(text) and not is_ours(theirs)):
        text = theirs
    elif is_ours(text):
        text = str(with_license_of_base(ModelCard(renamed(text, repo_id))))
    if text is None:
        return []
    text = _tagged(text, [to.tags] if isinstance(to.tags, str) else list(to.tags or ()))
    return [] if text == theirs else [CommitOperationAdd(CARD, text.encode())]


def _tagged(text: str, tags: list[str]) -> str:
    card = ModelCard(text)
    known = card.data.get("tags") or []
    missing = [tag for tag in tags if tag not in known]
    if not missing:
        return text
    card.data["tags"] = [*known, *missing]
    return str(card)


def _message(folder: Path, to: Destination, err: Exception) -> str:
    status = getattr(getattr(err, "response", None), "status_code", None)
    # For a large file the client says which one, and its cause says why.
    cause = " ".join(
        f"{err} {err.__cause__ or ''}".split()
        if isinstance(err, RuntimeError)
        else str(err).split()
    )
    remedy = {
        401: "Log in with `hf auth login`, or pass token=.",
        403: "Use a token with write access to this repository.",
        404: "Check the repository's name and the token's access to it.",
    }.get(status or 0, "Push again: files that arrived are not sent twice.")
    return (
        f"could not push {folder} to {to.repo_id}: {cause} "
        f"Nothing changed in the repository. {remedy}"
    )
