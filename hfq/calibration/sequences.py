"""Token sequences on their way to batches: in which order, how many at a time, and how they are told apart."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["MOST_TOKENS", "batches", "by_length", "fingerprint", "token_draws"]

# Tokens that run through a block at a time, at most: more of them are not faster.
MOST_TOKENS = 8192


def by_length(sequences: Sequence[Tensor]) -> list[Tensor]:
    """In the order of the first of each length, so that equal ones are neighbours."""
    place: dict[int, int] = {}
    for sequence in sequences:
        place.setdefault(len(sequence), len(place))
    return sorted(sequences, key=lambda sequence: place[len(sequence)])


def token_draws(sequences: Sequence[Tensor]) -> list[Tensor]:
    """A random number for each token, the same whichever process has it: as many `[T]` as there are sequences."""
    lengths = list(map(len, sequences))
    drawn = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0))
    return list(torch.split(drawn, lengths))


def batches(sequences: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    """Neighbours of one length together, so that nothing has to be padded: int64 `[B, T]`."""
    for length, equal in itertools.groupby(sequences, len):
        yield from torch.split(torch.stack(list(equal)), max(1, tokens // length))


def fingerprint(sequences: Sequence[Tensor]) -> str:
    """SHA-256 of token sequences."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.cpu().numpy().tobytes())
    return digest.hexdigest()
