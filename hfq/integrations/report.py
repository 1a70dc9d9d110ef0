"""What one call of `hfq.quantize` did, as data, as a table and as a picture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..calibration.allocation import Allocation
from ..calibration.report import CalibrationReport
from ..evaluation.speed import Speed
from ..plot import Series, log_plot
from ..table import format_bytes, format_table

__all__ = ["PICTURE", "REPORT", "HeldOut", "Report"]

REPORT = "hfq_report.json"
PICTURE = "hfq_errors.svg"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The quantized model beside the float one, on sequences of the data set that nothing was calibrated with.

    Attributes:
        tokens: predicted ones.
        perplexity, reference_perplexity: of the quantized and of the float model.
        kl: KL(float || quantized), nats per token.
        top1_agreement: share of tokens that both rank first.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Attributes:
    model, output: where it came from and went.
    settings: of the config.
    quantized: packed weights.
    kept: weights that stay in float -> why.
    bytes_before: of all weights in the dtype that they were loaded in.
    bytes_after: of all weights as they are stored.
    bits_per_weight: over the whole model.
    logit_difference: between the written model, loaded in a new process, and the one in memory, as a share of the
        largest logit. None: the model does not run block by block, so the written one was only loaded and run.
    seconds: of this run; a run that went on counts what was left.
    processes: that worked together.
    resumed_blocks: blocks that an earlier run had finished.
    batch_tokens: that ran through a block at a time; sums are rounded accordingly. None without data.
    calibration: what was done to each weight; None without data.
    allocation: what `target_bits` came to; None without it.
    held_out: None without data, or where all of it was used.
    speed: of the written model, in the process that loaded it again; None where it could not be measured.
    """

    model: str
    output: str
    settings: Mapping[str, Any]
    quantized: int
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    logit_difference: float | None
    seconds: float
    processes: int = 1
    resumed_blocks: int = 0
    batch_tokens: int | None = None
    calibration: CalibrationReport | None = None
    allocation: Allocation | None = None
    held_out: HeldOut | None = None
    speed: Speed | None = None

    def results(self) -> dict[str, float]:
        """What the run measured, for the model's card."""
        found: dict[str, float] = {"size_mb": self.bytes_after / 1e6}
        if self.held_out is not None:
            found |= {key: value for key, value in asdict(self.held_out).items() if key != "tokens"}
        if self.calibration is not None:
            errors = [each.error for each in self.calibration.weights if each.error is not None]
            found |= {"layer_error": sum(errors) / len(errors)} if errors else {}
        if self.speed is not None and self.speed.decode_tokens_per_s is not None:
            found["decode_tokens_per_s"] = self.speed.decode_tokens_per_s
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        allocation = None if self.allocation is None else self.allocation.to_dict()
        return {**asdict(self), "allocation": allocation}

    def table(self) -> str:
        """The report as text."""
        total = self.quantized + len(self.kept)
        before, after = self.bytes_before, self.bytes_after
        size = f"{format_bytes(before)} -> {format_bytes(after)} ({after / before:.0%})"
        rows = [
            ["weights", f"quantized {self.quantized} of {total}"],
            *(["", f"kept {n}: {why}"] for why, n in Counter(self.kept.values()).most_common()),
            ["size", size],
            ["bits per weight", f"{self.bits_per_weight:.2f}"],
            ["saved and reloaded", _gate(self.logit_difference)],
        ]
        if self.calibration is not None:
            known = self.calibration
            rows.append(
                ["calibrated with", f"{known.tokens} tokens in {known.sequences} sequences"]
            )
            rows += [["", f"{each.name}: {each.note}"] for each in known.weights if each.note]
        if self.held_out is not None:
            held = self.held_out
            rows += [
                ["perplexity", f"{held.reference_perplexity:.3f} -> {held.perplexity:.3f}"],
                ["KL to float", f"{held.kl:.5f} nats per token ({held.tokens} held-out tokens)"],
                ["top-1 agreement", f"{held.top1_agreement:.2%}"],
            ]
        if self.speed is not None:
            rows.append(["speed", _tokens_per_second(self.speed)])
        if self.resumed_blocks:
            rows.append(["gone on after", f"{self.resumed_blocks} finished blocks"])
        together = f" of {self.processes} processes" if self.processes > 1 else ""
        rows += [["time", f"{self.seconds:.1f} s{together}"], ["output", self.output]]
        table = format_table(["model", self.model], rows)
        return table if self.allocation is None else f"{table}\n\n{self.allocation.table()}"

    def write(self, folder: Path) -> None:
        """`REPORT`, and `PICTURE` where there are errors to show."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
        if self.calibration is not None and (series := _errors(self.calibration)):
            title = "Relative squared error of each layer's output"
            (folder / PICTURE).write_text(log_plot(title, "block", series), encoding="utf-8")


def _tokens_per_second(speed: Speed) -> str:
    prompt = f"prompt of {speed.prompt_tokens} tokens {speed.prefill_tokens_per_s:.0f} tokens/s"
    decode = speed.decode_tokens_per_s
    return prompt if decode is None else f"decode {decode:.1f} tokens/s, {prompt}"


def _gate(difference: float | None) -> str:
    if difference is None:
        return "finite logits (there were none in memory to compare with)"
    return f"logits differ by {difference:.1e} of the largest" if difference else "identical logits"


def _errors(calibration: CalibrationReport) -> list[Series]:
    """A line for each kind of layer: its error by the number of its block."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for weight in calibration.weights:
        numbers = [int(part) for part in weight.name.split(".") if part.isdigit()]
        if weight.error and numbers:
            kind = weight.name.rpartition(f".{numbers[0]}.")[2]
            lines.setdefault(kind, []).append((numbers[0], weight.error))
    return [Series(name=kind, points=tuple(points)) for kind, points in lines.items()]
