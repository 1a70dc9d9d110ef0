"""What calibration did to each weight, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..table import format_table

__all__ = ["CalibrationReport", "WeightReport"]


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """One weight, or one stack of experts.

    Attributes:
        name: full name of the module, with the stack's name for experts.
        method: what chose the codes; another one than asked for where the weight has seen no data.
        tokens: that it was calibrated with; for a stack of experts, on average per expert.
        error: squared error of the layer's output over its squared output, on the calibration data; None without data.
        damping: what was added to the diagonal of its second moment, as a share of its mean; 0 where none was needed.
        seconds: for choosing the codes.
        note: what a reader should know; empty if nothing.
    """

    name: str
    method: str
    tokens: int
    error: float | None
    damping: float
    seconds: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What calibrating a model found.

    Attributes:
        weights: in the order of calibration.
        sequences, tokens: of the calibration data.
        sha256: of the tokens.
    """

    weights: Sequence[WeightReport]
    sequences: int
    tokens: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint tells about the data: no text, no path."""
        return {"sequences": self.sequences, "tokens": self.tokens, "sha256": self.sha256}

    def table(self) -> str:
        """The weights as text, and what to know about some of them."""
        rows = [
            [
                weight.name,
                weight.method,
                str(weight.tokens),
                "-" if weight.error is None else f"{weight.error:.2e}",
                f"{weight.damping:g}",
                f"{weight.seconds:.1f} s",
                weight.note,
            ]
            for weight in self.weights
        ]
        return format_table(["weight", "method", "tokens", "error", "damping", "time", ""], rows)
