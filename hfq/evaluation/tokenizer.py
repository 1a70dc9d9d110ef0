"""The tokenizer that belongs to a model."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from ..core.errors import ConfigError
from ..tokens import Tokenize

__all__ = ["tokenize_with"]


def tokenize_with(tokenizer: Any, model: nn.Module) -> Tokenize:
    """A text -> its token ids, with special tokens.

    Args:
        tokenizer: a tokenizer of Transformers or its path; None: the one stored beside the model.

    Raises:
        ConfigError: there is none.
    """
    if tokenizer is None:
        tokenizer = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not tokenizer:
            raise ConfigError(
                "the model names no folder to load a tokenizer from: pass tokenizer=, or token ids"
            )
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no tokenizer in {str(tokenizer)!r} ({error}): pass tokenizer="
            ) from error

    def tokenize(text: str) -> list[int]:
        # verbose=False: a text longer than the model's context is cut into windows later.
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    return tokenize
