"""How long `hfq.quantize` will take and how much memory: counted operations and bytes over measured rates.

For T calibration and D held-out tokens, a block with P parameters that a token meets, inputs of K columns, weights `[N, K]`:

    forward            (2 T + 2 D) * (2 P + 4 S H)            operations; S tokens in a sequence, H hidden size
    statistics         T * K^2 for each distinct input        half of a product: the other half mirrors it
    factorisations     K^3 for each distinct input
    choosing codes     the method's own time, measured on small weights, + 2 * N * K^2 operations where it is calibrated
    reading, writing   the checkpoint once, the packed weights twice (while it runs, and when it is done)
    check              a new process imports everything, loads what was written, runs some tokens

With `target_bits` the checkpoint is read four times; blocks run once more on all tokens, and again on a few for each
candidate and group; codes are chosen once more for each candidate.

Distinct inputs are taken to be as many as parents and widths of linear layers: q, k, v and o of an attention count as one,
gate and up as another, down as a third. Which layers truly read the same is only known when they run.

Memory is that of a process with everything imported, what stands outside of the blocks, the hidden states of all sequences,
and the larger of two moments: a block with its statistics while codes are chosen, or logits of the held-out text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..algorithms import ALGORITHMS, find_method
from ..calibration.sensitivity import MEASURED_TOKENS
from ..config import HfqConfig, Recipe
from ..diagnose.rates import Rates, recipe_key
from ..nn.experts import is_fused_experts

__all__ = ["Forecast", "Tokens", "Weight", "forecast"]

# Seconds to start Python and import torch, Transformers and a model, as `scripts/demo` shows on two cores.
_NEW_PROCESS = 6.0

# As in `hfq.calibration.run`: tokens that run through a block at a time.
_BATCH = 8192

# Numbers of 4 bytes that are alive for each weight while a grid is searched and columns are rounded, and for each entry
# of a second moment while it is factorised: counted in the code, checked by benchmarks/plan.py.
_PER_WEIGHT, _PER_ENTRY = 8, 6

# Weights that are quantized as they arrive are worked on in slices of this many.
_SLICE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Attributes:
    calibration, held_out: tokens of the data.
    longest: of a sequence.
    """

    calibration: int
    held_out: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight to be quantized.

    Attributes:
        name: of the module, and of the stack behind it for experts.
        parent: of the module.
        block: number of its block; None outside of them.
        shape: `(N, K)` or `(E, N, K)`.
        recipes: one, or one for each candidate where the bits are still to be chosen.
        with_data: quantized after its block has run.
    """

    name: str
    parent: str
    block: int | None
    shape: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    with_data: bool

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Attributes:
    seconds: part of the work -> predicted seconds.
    memory: what it is for -> predicted bytes at the peak; "block" and "logits" are alternatives.
    """

    seconds: Mapping[str, float]
    memory: Mapping[str, int]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak_memory(self) -> int:
        """Bytes."""
        either = ("block", "logits")
        common = sum(size for part, size in self.memory.items() if part not in either)
        return common + max(self.memory[part] for part in either)


def forecast(
    model: Any,
    config: HfqConfig,
    blocks: Sequence[nn.Module],
    weights: Sequence[Weight],
    tokens: Tokens,
    rates: Rates,
    interpreter: int,
    file_bytes: tuple[int, int],
) -> Forecast:
    """Predict one call of `hfq.quantize`.

    Args:
        model: the skeleton, with float modules where data is needed.
        blocks: of it.
        interpreter: bytes of a process with everything imported.
        file_bytes: of the checkpoint and of the packed one.
    """
    text = model.config.get_text_config()
    work = _Work(text, blocks, weights, tokens, config.target_bits is not None)
    seconds = {
        "reading and writing": (file_bytes[0] * (4 if work.measures else 1) + 2 * file_bytes[1])
        / rates.read,
        "forward": work.forward() / rates.forward,
        "statistics": work.statistics() / rates.float32,
        "factorisations": work.factors() / rates.factor,
        "choosing codes": work.choosing(rates),
        "check in a new process": _NEW_PROCESS + file_bytes[1] / rates.read,
    }
    size = next(model.parameters()).element_size()
    inside = sum(p.nbytes for block in blocks for p in block.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - inside
    drifts = 2 if work.drifts else 1
    alive = (drifts * tokens.calibration + 2 * tokens.held_out) + min(_BATCH, _all(tokens))
    memory = {
        "interpreter": interpreter,
        "outside of the blocks": outside,
        "hidden states": alive * text.hidden_size * size,
        "block": work.block_memory(size),
        "logits": (tokens.held_out * size + min(_BATCH, tokens.held_out) * 16) * text.vocab_size,
    }
    return Forecast(seconds=seconds, memory=memory)


class _Work:
    """Counted operations and bytes."""

    def __init__(
        self,
        text: Any,
        blocks: Sequence[nn.Module],
        weights: Sequence[Weight],
        tokens: Tokens,
        measures: bool,
    ) -> None:
        self.text, self.blocks, self.weights = text, blocks, weights
        self.tokens, self.measures = tokens, measures
        self.with_data = [weight for weight in weights if weight.with_data]
        self.drifts = any(each.recipes[0].options.get("gptaq") for each in weights)
        # What is summed up, per block: (parent, K) -> how many sums (one for each expert).
        self.inputs: dict[int | None, dict[tuple[str, int], int]] = {}
        for weight in self.with_data:
            found = self.inputs.setdefault(weight.block, {})
            found[weight.parent, weight.shape[-1]] = weight.experts

    def forward(self) -> float:
        """Operations of all passes through all blocks, and of the head."""
        t, d = self.tokens.calibration, self.tokens.held_out
        attention = 4 * min(self.tokens.longest, max(t, d)) * self.text.hidden_size
        per_token = sum(2 * self._met(block) + attention for block in self.blocks)
        passes: float = (3 if self.drifts else 2) * t + 2 * d
        if self.measures:
            groups = sum(map(len, self.inputs.values())) / max(1, len(self.blocks))
            candidates = max(len(weight.recipes) for weight in self.weights)
            few = min(t, MEASURED_TOKENS)
            passes += t + few * (4 + groups * candidates)
        head = 2 * self.text.hidden_size * self.text.vocab_size
        total: float = (
            passes * per_token + (3 * d + (3 * MEASURED_TOKENS if self.measures else 0)) * head
        )
        return total

    def statistics(self) -> float:
        """Operations of the sums."""
        passes = (2 if self.measures else 1) + (2 if self.drifts else 0)
        return sum(
            passes * self._seen(experts) * experts * columns**2
            for found in self.inputs.values()
            for (_, columns), experts in found.items()
        )

    def factors(self) -> float:
        """K^3 of all factorisations."""
        return sum(
            (2 if self.measures else 1) * experts * columns**3
            for found in self.inputs.values()
            for (_, columns), experts in found.items()
        )

    def choosing(self, rates: Rates) -> float:
        """Seconds."""
        total = 0.0
        for weight in self.weights:
            *_, rows, columns = weight.shape
            tries = weight.recipes if len(weight.recipes) > 1 else ()
            for recipe in (*tries, weight.recipes[0]):
                known, method = rates.choosing[recipe_key(recipe)], find_method(recipe.method)
                one = columns * (known.column + known.weight * rows)
                if ALGORITHMS.get(method.algorithm).calibrated:
                    one += 2 * rows * columns**2 / rates.float32
                total += weight.experts * one
            total += rates.choosing[recipe_key(weight.recipes[0])].transform * columns
        return total

    def block_memory(self, size: int) -> int:
        """Bytes of the largest block while codes are chosen or while it runs."""
        block = max((sum(p.nbytes for p in each.parameters()) for each in self.blocks), default=0)
        sums = max(
            (
                sum(n * columns**2 for (_, columns), n in each.items())
                for each in self.inputs.values()
            ),
            default=0,
        )
        widest = max((columns for each in self.inputs.values() for _, columns in each), default=0)
        largest = max((w.shape[-1] * w.shape[-2] for w in self.with_data), default=_SLICE)
        rows = max((weight.shape[-2] for weight in self.weights), default=0)
        batch = min(_BATCH, _all(self.tokens))
        runs = batch * (4 * rows * size + 6 * self.text.hidden_size * size + 4 * widest)
        chooses = 4 * (_PER_ENTRY * widest**2 + _PER_WEIGHT * largest)
        peak: int = block + 4 * sums + max(runs, chooses)
        return peak

    def _met(self, block: nn.Module) -> float:
        """Parameters that a token meets: of experts, those that it is sent to."""
        total = 0.0
        for module in block.modules():
            own: float = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if is_fused_experts(module):
                count = next(p for p in module.parameters() if p.dim() == 3).shape[0]
                own *= getattr(self.text, "num_experts_per_tok", count) / count
            total += own
        return total

    def _seen(self, experts: int) -> float:
        """Tokens that are summed up for each of some experts."""
        if experts == 1:
            return self.tokens.calibration
        return (
            self.tokens.calibration * getattr(self.text, "num_experts_per_tok", experts) / experts
        )


def _all(tokens: Tokens) -> int:
    return max(tokens.calibration, tokens.held_out)
