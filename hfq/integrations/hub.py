"""Saving and publishing quantized models: folders that are complete or unchanged, one commit, a model card."""

from __future__ import annotations

import inspect
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from ..core.errors import HfqError
from .card import CARD, has_foreign_card, model_card
from .staging import files_of, staged
from .upload import Destination, check_complete, upload

__all__ = ["attach", "detach", "push_to_hub"]


def attach(model: PreTrainedModel) -> None:
    """Let `save_pretrained` and `push_to_hub` of this model write complete folders with a model card.

    They become attributes of the instance: its class stays the one that pickle, pipelines and the auto classes
    know by name. Adapters that Transformers has loaded into the model are saved and pushed as ever.
    """
    model.save_pretrained = _Method(_save_pretrained, model)
    model.push_to_hub = _Method(_push_to_hub, model)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model is not a quantized one any more."""
    for name in ("save_pretrained", "push_to_hub"):
        vars(model).pop(name, None)


def push_to_hub(
    source: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload a quantized model, or the folder that one was saved into, as one commit.

    After a failure do the same again: large files that arrived are not sent twice. Weight files of an earlier
    upload that would shadow the new ones go with the same commit. A card that somebody else wrote stays, in the
    folder as in the repository.

    Args:
        source: a model, or a folder, of which hidden files are left out.
        repo_id: "organization/name", or "name" for one's own account; created if it does not exist.
        private, token, revision, create_pr, commit_message, commit_description: as in `huggingface_hub`.
        tags: added to those of the card.

    Raises:
        CheckpointError: the folder does not hold a complete model.
        PushError: the Hub refused, or the connection broke.
    """
    to = Destination(
        repo_id=repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        tags=tags,
    )
    if isinstance(source, PreTrainedModel):
        return _push(source, to, max_shard_size="50GB")
    folder = Path(source)
    files = files_of(folder)
    check_complete(folder, files)
    return upload(folder, files, to)


class _Method:
    """A function as a method of one model.

    A bound method or a partial in the model's own attributes would be a reference cycle: ``del model`` would not
    free GPU memory until the next garbage collection. Pickling a bound method would give back the one of the
    class. This holds the model weakly, and copies and pickles along with it.
    """

    def __init__(self, function: Callable[..., Any], model: PreTrainedModel) -> None:
        self._function = function
        self._model = weakref.ref(model)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._owner(), *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, (self._function, self._owner())

    def _owner(self) -> PreTrainedModel:
        model = self._model()
        if model is None:
            raise HfqError(
                "the model that this method belongs to is gone: of a shallow copy keep the original, "
                "or use copy.deepcopy"
            )
        return model


def _save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Transformers' `save_pretrained`, with a model card, and such that the folder changes completely or not at all.

    Raises:
        SaveError: the folder could not be written and is as it was.
        PushError: with ``push_to_hub=True``; the folder is complete.
    """
    stock = type(model).save_pretrained
    call = inspect.signature(stock).bind(model, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if _has_adapter(model) or given["distributed_checkpoint"]:
        return stock(*call.args, **call.kwargs)
    folder, pushes = Path(given["save_directory"]), given["push_to_hub"]
    given["push_to_hub"] = False
    if not model.should_save_on_this_rank(given["is_main_process"]):
        # Other ranks take part in gathering the weights and write nothing.
        with tempfile.TemporaryDirectory() as unused:
            given["save_directory"] = unused
            return stock(*call.args, **call.kwargs)
    with staged(folder) as new:
        given["save_directory"] = str(new)
        stock(*call.args, **call.kwargs)
        if not has_foreign_card(folder):
            card = model_card(model, name=folder.absolute().name)
            (new / CARD).write_text(str(card), encoding="utf-8")
        written = files_of(new)
    if pushes:
        options = {"repo_id": folder.absolute().name, **given["kwargs"], "token": given["token"]}
        upload(folder, written, Destination(**options))
    return None


def _push_to_hub(
    model: PreTrainedModel, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any
) -> CommitInfo:
    """Transformers' `push_to_hub`, with hfq's model card; see `hfq.push_to_hub`."""
    if _has_adapter(model):
        return type(model).push_to_hub(model, repo_id, max_shard_size=max_shard_size, **options)
    return _push(model, Destination(repo_id=repo_id, **options), max_shard_size)


def _push(model: PreTrainedModel, to: Destination, max_shard_size: int | str) -> CommitInfo:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return upload(folder, files_of(folder), to)


def _has_adapter(model: PreTrainedModel) -> bool:
    """Whether Transformers would save the adapter that it has loaded, and not the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))
