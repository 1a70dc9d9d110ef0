"""What an evaluation found, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..table import format_bytes, format_table

__all__ = ["Evaluation", "Measurement"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Figures of one model.

    Attributes:
        perplexity: exp of the mean negative log likelihood (nats) per predicted token.
        packed_bytes, kept_bytes: bytes of packed weights (scales included) and of weights in float.
        bits_per_weight: bits, over all weights of the model, scales and kept weights included.
        prefill_tokens_per_s: tokens per second of a prompt, batch 1; None where speed was not asked for.
        decode_tokens_per_s: generated tokens per second, batch 1, with a key/value cache; None likewise, and
            for models that return no cache.
        prompt_tokens: length of that prompt in tokens; None likewise.
    """

    perplexity: float
    packed_bytes: int
    kept_bytes: int
    bits_per_weight: float
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Measurement):
    """What `hfq.evaluate` returns: the figures of the model, and how it differs from the reference.

    Attributes:
        tokens: tokens read.
        predicted_tokens: tokens that the means are over; the first of each window is not predicted.
        seqlen: tokens per window.
        kl: KL(reference || model), mean per predicted token, in nats; 0 is perfect. None without a reference.
        top1_agreement: share (0 to 1) of predicted tokens where both models rank the same token first.
        reference: the figures of the reference.
    """

    tokens: int
    predicted_tokens: int
    seqlen: int
    kl: float | None = None
    top1_agreement: float | None = None
    reference: Measurement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the fields by their names."""
        return asdict(self)

    def table(self) -> str:
        """The figures as text, with the reference beside them."""
        columns = {"model": _figures(self)}
        columns["model"]["KL(reference || model)"] = _number(self.kl, "{:.4f} nats/token")
        columns["model"]["top-1 agreement"] = _number(self.top1_agreement, "{:.2%}")
        if self.reference is not None:
            columns["reference"] = _figures(self.reference)
        rows = [
            [name, *(column.get(name, "-") for column in columns.values())]
            for name, value in columns["model"].items()
            if value != "-"
        ]
        basis = f"{self.predicted_tokens} predicted tokens, windows of {self.seqlen}"
        return f"{format_table(['', *columns], rows)}\n{basis}"


def _figures(measured: Measurement) -> dict[str, str]:
    return {
        "perplexity": f"{measured.perplexity:.4f}",
        "weights, packed": format_bytes(measured.packed_bytes),
        "weights, kept in float": format_bytes(measured.kept_bytes),
        "bits per weight": f"{measured.bits_per_weight:.2f}",
        f"prefill, {measured.prompt_tokens} tokens": _number(
            measured.prefill_tokens_per_s, "{:.0f} tokens/s"
        ),
        "decode, batch 1": _number(measured.decode_tokens_per_s, "{:.1f} tokens/s"),
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
