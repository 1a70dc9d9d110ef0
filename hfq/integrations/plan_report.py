"""What a plan says: as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..table import format_bytes, format_table, without_numbers, wrapped
from .forecast import Forecast

__all__ = ["Plan", "PlannedWeight"]


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """One weight and what would become of it.

    Attributes:
        name: module, and the stack behind it for experts.
        method, format, group_size: how it would be quantized and stored; group_size -1 is a whole row.
        bits: one, or all that `target_bits` would choose among.
        shape: `(N, K)` or `(E, N, K)`.
        kernels: by bits, what would multiply with it on this machine.
        refused: (kernel, reason) of those that stand before it.
    """

    name: str
    method: str
    format: str
    bits: tuple[int, ...]
    group_size: int
    shape: tuple[int, ...]
    kernels: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `hfq.quantize` would do.

    Attributes:
        model: folder.
        weights: that would be packed.
        kept: weights that would stay in float -> why.
        problems: what stands in the way of a run, or will surprise; each with its remedy. Empty: go ahead.
        bytes_before, bytes_after: of the safetensors files, headers included; with `target_bits` at most that much.
        temporary_bytes: that the output's disk needs at the peak, the result included.
        tokens: of the calibration data; an upper bound where no data set was given.
        forecast: of time and memory.
    """

    model: str
    weights: tuple[PlannedWeight, ...]
    kept: Mapping[str, str]
    problems: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    temporary_bytes: int
    tokens: int
    forecast: Forecast
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        totals = {"seconds": self.forecast.total_seconds, "memory": self.forecast.peak_memory}
        return {**asdict(self), "predicted": totals}

    def table(self) -> str:
        """The plan as text: a row for weights that differ in their layer's number only, then figures and problems."""
        notes: dict[tuple[str, str], int] = {}
        rows = []
        for weight, count in Counter(map(_group, self.weights)).items():
            marks = [notes.setdefault(refusal, len(notes) + 1) for refusal in weight.refused]
            rows.append(
                [
                    weight.name,
                    str(count),
                    weight.method,
                    weight.format,
                    "/".join(map(str, weight.bits)),
                    "row" if weight.group_size == -1 else str(weight.group_size),
                    " x ".join(map(str, weight.shape)),
                    " ".join([_kernels(weight), *(f"[{mark}]" for mark in marks)]),
                ]
            )
        header = ["weight", "count", "method", "format", "bits", "group", "shape", "kernel"]
        lines = [format_table(header, rows)] if rows else ["no weight would be quantized"]
        lines += [
            wrapped(f"[{mark}] not {kernel}: {reason}") for (kernel, reason), mark in notes.items()
        ]
        lines += ["", format_table(["predicted", ""], self._figures())]
        lines += [wrapped(f"! {problem}") for problem in self.problems]
        return "\n".join(lines)

    def _figures(self) -> list[list[str]]:
        known, longest = self.forecast, sorted(self.forecast.seconds.items(), key=lambda x: -x[1])
        parts = ", ".join(f"{part} {_duration(seconds)}" for part, seconds in longest[:3])
        share = f"{self.bytes_after / max(self.bytes_before, 1):.0%}"
        size = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)} ({share})"
        return [
            *([f"kept {n}", why] for why, n in Counter(self.kept.values()).most_common()),
            ["size", size],
            ["disk while it runs", format_bytes(self.temporary_bytes)],
            ["memory", format_bytes(known.peak_memory)],
            ["time", f"{_duration(known.total_seconds)} ({parts})"],
            *([["calibration", f"{self.tokens} tokens"]] if self.tokens else []),
        ]

    def __str__(self) -> str:
        return self.table()


def _group(weight: PlannedWeight) -> PlannedWeight:
    return replace(weight, name=without_numbers(weight.name))


def _kernels(weight: PlannedWeight) -> str:
    """``cpu_rows16``, or ``dequantize (2, 3 bits), cpu_rows16 (4, 8 bits)``."""
    found: dict[str, list[str]] = {}
    for bits, kernel in zip(weight.bits, weight.kernels, strict=True):
        found.setdefault(kernel, []).append(str(bits))
    if len(found) == 1:
        return weight.kernels[0]
    return ", ".join(f"{kernel} ({', '.join(bits)} bits)" for kernel, bits in found.items())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
