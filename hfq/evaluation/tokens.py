"""From a data set to windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import ConfigError

__all__ = ["Dataset", "Tokenize", "token_stream", "windows"]

# A .txt or .jsonl file, texts, or tokens of any shape (read in row order).
Dataset = str | Path | Sequence[str] | Sequence[Tensor] | Tensor

# One text to its token ids, with the special tokens of its tokenizer.
Tokenize = Callable[[str], list[int]]


def token_stream(
    dataset: Dataset, tokenize: Callable[[], Tokenize], max_tokens: int | None = None
) -> Tensor:
    """All tokens of a data set in one row.

    Args:
        dataset: the path of a .txt file (one text) or a .jsonl file (a text per line: a string, or an object with
            the key "text"), a list of texts, or a tensor of token ids or a list of them. Texts are tokenized one by one
            and joined.
        tokenize: gives the tokenizer; called only where there is text.
        max_tokens: stop after this many.

    Returns:
        int64 `[T]`, T at least 2.

    Raises:
        ConfigError: no text, fewer than 2 tokens, an unreadable format.
        OSError: the file cannot be read.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(
            f"max_tokens must be at least 2 (one token predicts the next), got {max_tokens}"
        )
    if isinstance(dataset, Tensor):
        stream = _token_ids(dataset)[:max_tokens]
    elif not isinstance(dataset, (str, Path)) and dataset and isinstance(dataset[0], Tensor):
        stream = torch.cat([_token_ids(part) for part in dataset])[:max_tokens]
    else:
        stream = _tokenized(_texts(dataset), tokenize(), max_tokens)
    if stream.numel() < 2:
        raise ConfigError(
            f"expected at least 2 tokens to evaluate on, got {stream.numel()}: give a longer text"
        )
    return stream


def windows(stream: Tensor, seqlen: int, batch_size: int) -> Iterator[Tensor]:
    """Cut `[T]` into non-overlapping windows `[B, seqlen]`; what is left over makes a last, shorter one.

    A single left-over token predicts nothing and is dropped.
    """
    whole = stream.numel() // seqlen
    if whole:
        yield from torch.split(stream[: whole * seqlen].view(whole, seqlen), batch_size)
    rest = stream[whole * seqlen :]
    if rest.numel() > 1:
        yield rest.unsqueeze(0)


def _token_ids(dataset: object) -> Tensor:
    if not isinstance(dataset, Tensor):
        raise ConfigError(
            f"expected a tensor of token ids like the entries before it, got {type(dataset).__name__}"
        )
    if dataset.dtype.is_floating_point or dataset.dtype.is_complex or dataset.dtype == torch.bool:
        raise ConfigError(f"expected token ids of an integer dtype, got {dataset.dtype}")
    return dataset.detach().cpu().flatten().long()


def _tokenized(texts: Iterator[str], tokenize: Tokenize, max_tokens: int | None) -> Tensor:
    ids: list[int] = []
    empty = True
    for text in texts:
        if not text.strip():
            continue
        empty = False
        ids.extend(tokenize(text))
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    if empty:
        raise ConfigError("the dataset has no text: every entry is empty")
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def _texts(dataset: str | Path | Sequence[object]) -> Iterator[str]:
    if isinstance(dataset, (str, Path)):
        yield from _file_texts(Path(dataset))
        return
    for index, text in enumerate(dataset):
        if not isinstance(text, str):
            raise ConfigError(
                f"dataset must be a path, a list of texts or a tensor of token ids; entry {index} is "
                f"{type(text).__name__}"
            )
        yield text


def _file_texts(path: Path) -> Iterator[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"expected a .txt or .jsonl file, got {str(path)!r}; pass a single text as a list: [text]"
        )
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_text(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error


def _json_text(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected a string, or an object with a string under 'text'")
    return text
