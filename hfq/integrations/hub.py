"""Saving and publishing quantized models: complete or unchanged folders, one commit, a card; what other libraries ask of such a model."""

from __future__ import annotations

import inspect
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from ..nn.packed import packed_names
from .card import CARD, has_foreign_card, model_card
from .staging import files_of, staged
from .upload import Destination, check_complete, upload

__all__ = ["attach", "detach", "push_to_hub"]


def attach(model: PreTrainedModel) -> None:
    """Let `save_pretrained` and `push_to_hub` of this model write complete folders with a card.

    The model's class becomes a subclass of the same name with these two methods. (Bound methods in the
    instance's attributes would be a reference cycle, so that ``del model`` frees no memory; weak ones would
    fail in ``from_pretrained(...).push_to_hub(...)``.) Adapters that Transformers has loaded into the model
    are saved and pushed as ever.
    """
    if not isinstance(model, _Publishing):
        # mypy takes the __hash__ of the instances for that of the class.
        model.__class__ = _publishing_class(type(model))  # type: ignore[arg-type]


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model is not a quantized one any more."""
    if isinstance(model, _Publishing):
        model.__class__ = model.stock_class


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

    After a failure do the same again: large files that arrived are not sent twice. Weight files of
    an earlier upload that would shadow the new ones go with the same commit. A card that somebody
    else wrote stays, in the folder as in the repository.

    Args:
        source: a model, or a folder, of which hidden files are left out.
        repo_id: "organization/name", or "name" for one's own account; created if it does not exist.
        private, token, revision, create_pr, commit_message, commit_description: as in
            `huggingface_hub`.
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


# What stands before the names of a model's parameters in adapters of PEFT, which answer questions for attributes by asking the model.
_ADAPTERS = ("", "base_model.", "base_model.model.")


class _Unsynced:
    """Names of Parameters that `nn.parallel.DistributedDataParallel` leaves as they are, as long as nobody says others.

    It sends all of them from the first process to the others, and neither NCCL nor Gloo sends the 16-bit integers in which packed
    modules hold scales. (No property: whoever sets the attribute of a model is to be heard.)
    """

    def __get__(self, model: Any, owner: type[Any]) -> list[str]:
        names = () if model is None else tuple(packed_names(model))
        return [prefix + name for prefix in _ADAPTERS for name in names]


class _Publishing:
    """Mixin before a model's own class: saving and pushing by hfq, training in several processes."""

    stock_class: ClassVar[type[Any]]
    _ddp_params_and_buffers_to_ignore = _Unsynced()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """See `hfq.integrations.hub._save_pretrained`."""
        _save_pretrained(cast(PreTrainedModel, self), *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """See `hfq.integrations.hub._push_to_hub`."""
        return _push_to_hub(cast(PreTrainedModel, self), *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By name, pickle and copy would find the stock class.
        return _blank, (self.stock_class,), self.__dict__


@cache
def _publishing_class(stock: type[Any]) -> type[Any]:
    fields = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (_Publishing, stock), {**fields, "stock_class": stock})


def _blank(stock: type[Any]) -> PreTrainedModel:
    """A model without state, for `copy` and `pickle`."""
    cls = _publishing_class(stock)  # type: ignore[arg-type]  # as in `attach`
    return cast(PreTrainedModel, object.__new__(cls))


def _save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Transformers' `save_pretrained`, with a card; the folder changes completely or not at all.

    Raises:
        SaveError: the folder could not be written and is as it was.
        PushError: with ``push_to_hub=True``; the folder is complete.
    """
    stock = _stock(model).save_pretrained
    # Classes that override it take (*args, **kwargs) and pass them on.
    call = inspect.signature(PreTrainedModel.save_pretrained).bind(model, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if _has_adapter(model) or given["distributed_checkpoint"]:
        stock(*call.args, **call.kwargs)
        return
    folder, pushes = Path(given["save_directory"]), given["push_to_hub"]
    given["push_to_hub"] = False
    if not model.should_save_on_this_rank(given["is_main_process"]):
        # Other ranks take part in gathering the weights and write nothing.
        with tempfile.TemporaryDirectory() as unused:
            given["save_directory"] = unused
            stock(*call.args, **call.kwargs)
        return
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


def _push_to_hub(
    model: PreTrainedModel, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any
) -> Any:
    """Transformers' `push_to_hub`, with hfq's model card; see `hfq.push_to_hub`."""
    if _has_adapter(model):
        stock: Any = _stock(model).push_to_hub
        return stock(model, repo_id, max_shard_size=max_shard_size, **options)
    return _push(model, Destination(repo_id=repo_id, **options), max_shard_size)


def _push(model: PreTrainedModel, to: Destination, max_shard_size: int | str) -> CommitInfo:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return upload(folder, files_of(folder), to)


def _stock(model: PreTrainedModel) -> type[Any]:
    return model.stock_class if isinstance(model, _Publishing) else type(model)


def _has_adapter(model: PreTrainedModel) -> bool:
    """Whether Transformers would save the adapter that it has loaded, and not the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))
