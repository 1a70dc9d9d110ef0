"""`hfq.evaluate`: one pass over a text with a model and, beside it, its float reference."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..tokens import Dataset, token_stream, windows
from .divergence import Totals, compare, score
from .logits import EvaluationError, evaluating, position_limit, window_logits
from .report import Evaluation, Measurement
from .size import weight_size
from .speed import measure_speed_within_limit
from .tokenizer import tokenize_with

__all__ = ["evaluate"]

ModelOrPath = nn.Module | str | os.PathLike[str]


def evaluate(
    model: ModelOrPath,
    reference: ModelOrPath | None = None,
    *,
    dataset: Dataset,
    tokenizer: Any = None,
    seqlen: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 1,
    speed: bool = True,
) -> Evaluation:
    """Measure a causal language model on a text.

    Perplexity is exp of the mean negative log likelihood over non-overlapping windows; the first token of a
    window is given, all others are predicted. KL and top-1 agreement are taken at the same positions. Logits of
    one batch of windows are in memory at a time; log-probabilities are float32, sums float64.

    Args:
        model: the model, or what `AutoModelForCausalLM.from_pretrained` takes.
        reference: the float model to compare with, likewise.
        dataset: a .txt or .jsonl file, a list of texts, or a tensor of token ids; see `tokens.token_stream`.
        tokenizer: a tokenizer or its path; default: the one stored with the model. Unused for token ids.
        seqlen: tokens per window, at most; cut to the model's `max_position_embeddings` (the result says).
        max_tokens: read no more than this many tokens.
        batch_size: windows per forward.
        speed: measure tokens per second, too.

    Raises:
        ConfigError: a setting out of range, a dataset without at least two tokens, no tokenizer.
        EvaluationError: NaN or infinite logits, tokens or logits of different vocabularies.
        OSError: a file or a model cannot be read.
    """
    _check_at_least("seqlen", seqlen, 2)
    _check_at_least("batch_size", batch_size, 1)
    subject = _loaded(model)
    stream = token_stream(dataset, lambda: tokenize_with(tokenizer, subject), max_tokens)
    other = None if reference is None else _loaded(reference)
    seqlen = min(
        seqlen, *(position_limit(each) or seqlen for each in (subject, other) if each is not None)
    )
    with evaluating(*(each for each in (subject, other) if each is not None)):
        totals, other_totals = _read(subject, other, stream, seqlen, batch_size)
        measured = _measurement(subject, totals, stream[:seqlen] if speed else None)
        beside = (
            None
            if other is None
            else _measurement(other, other_totals, stream[:seqlen] if speed else None)
        )
    return Evaluation(
        **asdict(measured),
        tokens=stream.numel(),
        predicted_tokens=totals.count,
        seqlen=seqlen,
        kl=None if other is None else totals.kl / totals.count,
        top1_agreement=None if other is None else totals.agreed / totals.count,
        reference=beside,
    )


def _read(
    model: nn.Module, reference: nn.Module | None, stream: Tensor, seqlen: int, batch_size: int
) -> tuple[Totals, Totals]:
    """Sums of the model (with its divergence) and of the reference over all windows."""
    totals, reference_totals = Totals(), Totals()
    for ids in windows(stream, seqlen, batch_size):
        logits = _predictions(window_logits(model, ids, "the model"))
        targets = ids[:, 1:].flatten().to(logits.device)
        score(logits, targets, totals)
        if reference is not None:
            wanted = _predictions(window_logits(reference, ids, "the reference")).to(logits.device)
            if wanted.shape != logits.shape:
                raise EvaluationError(
                    f"expected logits over the {wanted.shape[-1]} tokens of the reference, got {logits.shape[-1]} "
                    "from the model: compare a model with the float model it was made from"
                )
            score(wanted, targets, reference_totals)
            compare(logits, wanted, totals)
    return totals, reference_totals


def _predictions(logits: Tensor) -> Tensor:
    """`[B, T, V]` -> `[B * (T - 1), V]`: what follows the last token of a window is unknown."""
    return logits[:, :-1].flatten(0, 1)


def _measurement(model: nn.Module, totals: Totals, prompt: Tensor | None) -> Measurement:
    size = weight_size(model)
    speed = None if prompt is None else measure_speed_within_limit(model, prompt)
    return Measurement(
        # torch.exp gives inf where math.exp raises.
        perplexity=torch.tensor(totals.nll / totals.count, dtype=torch.float64).exp().item(),
        packed_bytes=size.packed_bytes,
        kept_bytes=size.kept_bytes,
        bits_per_weight=size.bits_per_weight,
        **({} if speed is None else asdict(speed)),
    )


def _loaded(model: ModelOrPath) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForCausalLM

    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model)
    return loaded


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
