"""Weights that a grid serves badly and that are stored beside it: which ones, and as what."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError
from .spec import SCALE_BLOCK, SpqrSpec, outlier_count
from .weight import Outliers, index_dtype

__all__ = ["collect_outliers", "largest", "largest_of_pieces"]


def largest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest scores: bool `[N, K]`."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    chosen.view(-1)[scores.flatten().topk(count, sorted=False).indices] = True
    return chosen


def largest_of_pieces(scores: Tensor, spec: SpqrSpec) -> Tensor:
    """The places of `outlier_count` outliers, chosen for `SCALE_BLOCK` rows at a time: bool `[N, K]`.

    So the choice in a slice of rows is that of the whole, and a weight can be packed in pieces.
    """
    pieces = [
        largest(piece, outlier_count(spec, *piece.shape))
        for piece in torch.split(scores, SCALE_BLOCK)
    ]
    return torch.cat(pieces)


def collect_outliers(chosen: Tensor, differences: Tensor, spec: SpqrSpec) -> Outliers:
    """The outliers of a weight.

    Args:
        chosen: bool `[N, K]`.
        differences: `[N, K]`, what the dense weight lacks there.

    Raises:
        ConfigError: a difference does not fit ``spec.scale_dtype``.
    """
    values = differences[chosen].to(spec.torch_stat_dtype)
    if not bool(values.isfinite().all()):
        raise ConfigError(
            f"an outlier of {differences[chosen].abs().max().item():.3g} does not fit scale_dtype="
            f"{spec.scale_dtype!r}; use scale_dtype='float32'"
        )
    index = index_dtype(chosen.shape[1])
    return Outliers(
        counts=chosen.sum(1).to(index), columns=chosen.nonzero()[:, 1].to(index), values=values
    )
