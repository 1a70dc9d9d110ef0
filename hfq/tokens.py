"""From a data set to windows of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .core.errors import ConfigError

__all__ = [
    "Dataset",
    "Tokenize",
    "choose",
    "is_dataset_name",
    "sequences",
    "token_stream",
    "windows",
]

# A .txt, .jsonl or .parquet file, a name on the Hub, texts, or tokens of any shape (read in row order).
Dataset = str | Path | Sequence[str] | Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | Tensor

_SUFFIXES = (".txt", ".jsonl", ".parquet")

# name:config:split:column, of which a name with an owner (or a folder) can stand alone.
_NAME = re.compile(r"[^\s:]+/[^\s:]+(:[^\s:]*){0,3}|[^\s:/]+(:[^\s:]*){1,3}")

# Older releases run code that a data set brings along.
_DATASETS = "datasets>=4"

# One text to its token ids, with the special tokens of its tokenizer.
Tokenize = Callable[[str], list[int]]


def token_stream(
    dataset: Dataset, tokenize: Callable[[], Tokenize], max_tokens: int | None = None
) -> Tensor:
    """All tokens of a data set in one row.

    Args:
        dataset: the path of a .txt file (one text), of a .jsonl file (a text per line: a string, or an object with
            the key "text") or of a .parquet file (with a column "text"), a name that the package "datasets" knows
            (``owner/name:config:split:column``; see `_named_texts`), a list of texts, or a tensor of token ids or a
            list of them. Texts are tokenized one by one and joined.
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
        stream = _tokenized(_texts(dataset), tokenize, max_tokens)
    if stream.numel() < 2:
        raise ConfigError(
            f"expected at least 2 tokens to evaluate on, got {stream.numel()}: give a longer text"
        )
    return stream


def sequences(
    dataset: Dataset, tokenize: Callable[[], Tokenize], seqlen: int, enough: int | None = None
) -> list[Tensor]:
    """A data set as sequences of tokens to calibrate with.

    Args:
        dataset: as for `token_stream`. Text is joined and cut into windows of exactly `seqlen` tokens (one shorter
            one if there is not enough text). Of tokens every entry, or every row of a 2-D tensor, is a sequence of
            its own, cut where it is longer; entries may be mappings with "input_ids" and "attention_mask" as
            tokenizers give them: masked positions are left out.
        seqlen: tokens per sequence, at most.
        enough: sequences after which reading a data set of the Hub ends; it may have terabytes.

    Returns:
        int64 tensors `[T]`, T from 2 to `seqlen`, in the order of the data set.

    Raises:
        ConfigError: as `token_stream`; no sequence of two tokens.
    """
    rows = _token_rows(dataset)
    if rows is None:
        most = enough * seqlen if enough and is_dataset_name(dataset) else None
        stream = token_stream(dataset, tokenize, most)
        found = [batch[0] for batch in windows(stream, seqlen, 1)]
        # A rest that is shorter than the others only counts where there is nothing else.
        found = [window for window in found if len(window) == seqlen] or found
    else:
        found = [part for row in rows for part in torch.split(row, seqlen) if len(part) > 1]
    if not found:
        raise ConfigError("the dataset has no sequence of at least 2 tokens")
    return found


def choose(found: Sequence[Tensor], count: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """`count` sequences at random, in their order, and the others in random order."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in sorted(order[:count])], [found[i] for i in order[count:]]


def _token_rows(dataset: Dataset) -> list[Tensor] | None:
    """The sequences of a data set that is tokens already, without masked positions; None for text."""
    if isinstance(dataset, Tensor):
        ids = dataset if dataset.dim() > 1 else dataset.unsqueeze(0)
        return [_token_ids(row) for row in ids.flatten(0, -2)]
    if isinstance(dataset, (str, Path)) or not dataset or isinstance(dataset[0], str):
        return None
    rows: list[Tensor] = []
    for entry in dataset:
        if isinstance(entry, Mapping):
            ids = torch.as_tensor(entry["input_ids"])
            mask = torch.as_tensor(entry.get("attention_mask", torch.ones_like(ids))).bool()
        else:
            ids = torch.as_tensor(entry)
            mask = torch.ones_like(ids, dtype=torch.bool)
        ids, mask = (ids, mask) if ids.dim() > 1 else (ids.unsqueeze(0), mask.unsqueeze(0))
        for row, kept in zip(ids.flatten(0, -2), mask.flatten(0, -2), strict=True):
            rows.append(_token_ids(row[kept]))
    return rows


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


def _tokenized(
    texts: Iterator[str], load: Callable[[], Tokenize], max_tokens: int | None
) -> Tensor:
    ids: list[int] = []
    tokenize: Tokenize | None = None
    for text in texts:
        if not text.strip():
            continue
        tokenize = tokenize or load()
        ids.extend(tokenize(text))
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    if tokenize is None:
        raise ConfigError("the dataset has no text: every entry is empty")
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def _texts(dataset: str | Path | Sequence[object]) -> Iterator[str]:
    if is_dataset_name(dataset):
        yield from _named_texts(str(dataset))
        return
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


def is_dataset_name(dataset: object) -> bool:
    """Whether a string names a data set for the package "datasets", and not a file."""
    if not isinstance(dataset, str) or Path(dataset).suffix in _SUFFIXES or Path(dataset).is_file():
        return False
    return Path(dataset).is_dir() or _NAME.fullmatch(dataset) is not None


def _named_texts(name: str) -> Iterator[str]:
    """Texts of ``owner/name:config:split:column``, read as they are needed.

    What is left out or empty: the data set's only config, split "train", column "text".
    """
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"dataset {name!r}: a name needs the package datasets: pip install '{_DATASETS}'; or give a .txt, .jsonl or "
            ".parquet file"
        ) from error
    if int(str(datasets.__version__).partition(".")[0]) < 4:
        raise ConfigError(
            f"dataset {name!r}: datasets {datasets.__version__} can run code that comes with the data: "
            f"pip install -U '{_DATASETS}'"
        )
    path, config, split, column = [*name.split(":"), "", "", ""][:4]
    column = column or "text"
    try:
        found = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    # What it raises for names, configs and splits that are not there, and without a network.
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"dataset {name!r} cannot be read ({error}); expected name:config:split:column, such as "
            "'Salesforce/wikitext:wikitext-2-raw-v1:train', or a .txt, .jsonl or .parquet file"
        ) from error
    for row in found:
        text = row.get(column)
        if not isinstance(text, str):
            raise ConfigError(
                f"dataset {name!r}: expected strings in column {column!r}, got {text!r}; it has the columns "
                f"{', '.join(row)}: name one of them, as in '{path}:{config}:{split}:COLUMN'"
            )
        yield text


def _file_texts(path: Path) -> Iterator[str]:
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"expected a .txt, .jsonl or .parquet file, got {str(path)!r}; a data set of the Hub is named as "
            "owner/name:config:split; pass a single text as a list: [text]"
        )
    if path.suffix == ".parquet":
        yield from _parquet_texts(path)
        return
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


def _parquet_texts(path: Path) -> Iterator[str]:
    try:
        # It comes with the package "datasets"; hfq does not ask for it.
        from pyarrow import parquet  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from error
    table = parquet.ParquetFile(path)
    if "text" not in table.schema_arrow.names:
        raise ConfigError(
            f"{path}: expected a column 'text', got {', '.join(table.schema_arrow.names)}"
        )
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise ConfigError(f"{path}: expected strings in column 'text', got {text!r}")
            yield text


def _json_text(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected a string, or an object with a string under 'text'")
    return text
