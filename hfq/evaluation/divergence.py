"""How well logits predict a text, and how far they are from a reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Totals", "compare", "score"]

# Positions whose float32 log-probabilities are in memory at a time: 64 rows of 150,000 tokens are 38 MB.
_ROWS = 64


@dataclass
class Totals:
    """Sums over predicted tokens.

    Attributes:
        count: predicted tokens.
        nll: negative log likelihood, nats.
        kl: KL(reference || model), nats.
        agreed: tokens where both models rank the same token first.
    """

    count: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            count=self.count + other.count,
            nll=self.nll + other.nll,
            kl=self.kl + other.kl,
            agreed=self.agreed + other.agreed,
        )


def score(logits: Tensor, targets: Tensor, totals: Totals) -> None:
    """Add the predictions of one window: logits float `[T, V]`, the tokens that followed int64 `[T]`."""
    for rows, wanted in zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True):
        log_p = torch.log_softmax(rows.float(), dim=-1)
        totals.nll -= log_p.gather(-1, wanted.unsqueeze(-1)).double().sum().item()
    totals.count += targets.numel()


def compare(logits: Tensor, reference: Tensor, totals: Totals) -> None:
    """Add the divergence of one window from the reference: both float `[T, V]`."""
    for rows, wanted in zip(torch.split(logits, _ROWS), torch.split(reference, _ROWS), strict=True):
        log_p, log_q = (
            torch.log_softmax(wanted.float(), dim=-1),
            torch.log_softmax(rows.float(), dim=-1),
        )
        # A token that the reference rules out (-inf) adds nothing, whatever the model says: 0 log 0 = 0.
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        totals.kl += terms.double().sum().item()
        totals.agreed += int((rows.argmax(-1) == wanted.argmax(-1)).sum().item())
