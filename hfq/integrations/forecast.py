"""How long `hfq.quantize` will take and how much memory: counted operations and bytes over measured rates.

For T calibration and D held-out tokens, a block with P parameters that a token meets, inputs of K columns, weights `[N, K]`:

    forward            (2 T + 2 D) * (2 P + 4 S H)            operations; S tokens in a sequence, H hidden size
    statistics         T * K^2 for each distinct input        half of a product: the other half mirrors it
    factorisations     K^3 for each distinct input
    choosing codes     the method's own time, measured on small weights, + 2 * N * K^2 operations where it is calibrated,
                       + 5 * N * K^2 for each turn of `refine`, and for its U grid parameters of a row
                       N * U^3 as in factorisations
    sampling text      without a data set the whole model once for each token of a few sequences side by side
    reading, writing   the checkpoint once, the packed weights twice (while it runs, and when it is done)
    check              a new process imports everything, loads what was written, runs some tokens, and times some more

With `target_bits` the checkpoint is read four times; blocks run once more on all tokens, and again on a few for each
candidate and group; codes are chosen once more for each candidate.

Distinct inputs are taken to be as many as parents and widths of linear layers: q, k, v and o of an attention count as one,
gate and up as another, down as a third. Which layers truly read the same is only known when they run.

Memory is that of a process with everything imported, what stands outside of the blocks, the hidden states of all sequences,
and the larger of two moments: a block with its statistics while codes are chosen, or logits of a batch of held-out text.
Text is sampled before any of that is there, with the whole float model in memory where it fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..algorithms import ALGORITHMS, find_method
from ..calibration.sensitivity import BACKWARD, LONGEST, MEASURED_TOKENS
from ..config import HfqConfig, Recipe
from ..core.refine import fits_grid, turns_for
from ..core.spec import group_count
from ..diagnose.rates import COLUMNS, Rates, recipe_key
from ..nn.experts import is_fused_experts
from .own_text import OwnText

__all__ = ["Forecast", "Tokens", "Weight", "forecast"]

# Seconds to start Python and import torch, Transformers and a model, as `scripts/demo` shows on two cores.
_NEW_PROCESS = 6.0

# Seconds of Python for one block and one call.
_CALL = 5e-4

# Tokens whose time the check takes: prompts, and single ones.
_PROMPTS, _DECODED = 4 * 128, 33

# Numbers of 4 bytes that are alive for each weight while its codes are chosen, and for each entry of a second moment
# while it is factorised, of which one stays: counted in the code, checked by benchmarks/plan.py.
_PER_WEIGHT, _PER_ENTRY = 9, 3

# Weights that are quantized as they arrive are worked on in slices of this many.
_SLICE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Attributes:
    calibration, held_out: tokens of the data.
    longest: of a sequence.
    compared: whether both models are compared on what is held out.
    batch: tokens that run through a block at a time, at most.
    """

    calibration: int
    held_out: int
    longest: int
    compared: bool
    batch: int


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
    memory: what it is for -> predicted bytes at the peak; "block" and "logits" are alternatives, and "sampling text" to all
        but the interpreter.
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
        running = {key: size for key, size in self.memory.items() if key != "sampling text"}
        interpreter = running.pop("interpreter")
        common = sum(size for part, size in running.items() if part not in either)
        peak = common + max(self.memory[part] for part in either)
        return interpreter + max(peak, self.memory["sampling text"])


def forecast(
    model: Any,
    config: HfqConfig,
    blocks: Sequence[nn.Module],
    weights: Sequence[Weight],
    tokens: Tokens,
    rates: Rates,
    interpreter: int,
    file_bytes: tuple[int, int],
    own: OwnText | None,
) -> Forecast:
    """Predict one call of `hfq.quantize`.

    Args:
        model: the skeleton, with float modules where data is needed.
        blocks: of it.
        interpreter: bytes of a process with everything imported.
        file_bytes: of the checkpoint and of the packed one.
        own: text that the model samples; None without.
    """
    text = model.config.get_text_config()
    size = next(model.parameters()).element_size()
    work = _Work(text, blocks, weights, tokens, config.target_bits is not None)
    seconds = {
        "reading and writing": (file_bytes[0] * (4 if work.measures else 1) + 2 * file_bytes[1])
        / rates.read,
        "forward": work.forward() / rates.forward,
        "statistics": work.statistics() / rates.moments,
        "factorisations": work.factors() / rates.factor,
        "choosing codes": work.choosing(rates),
        "check in a new process": _NEW_PROCESS
        + (1 + _DECODED) * file_bytes[1] / rates.read
        + _PROMPTS * work.per_token() / rates.forward,
    }
    if own is not None:
        seconds["sampling text"] = _sampling(own, work, rates, file_bytes[0])
    inside = sum(p.nbytes for block in blocks for p in block.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - inside
    drifts = 2 if work.drifts else 1
    alive = (drifts * tokens.calibration + 2 * tokens.held_out) + min(tokens.batch, _all(tokens))
    memory = {
        "interpreter": interpreter,
        "outside of the blocks": outside,
        "hidden states": (alive + 3 * work.few) * text.hidden_size * size,
        "block": work.block_memory(size),
        "logits": work.logits_memory(size),
        "sampling text": 0 if own is None else own.bytes,
    }
    return Forecast(seconds=seconds, memory=memory)


def _sampling(own: OwnText, work: _Work, rates: Rates, file_bytes: int) -> float:
    """Seconds. A few tokens at a time: either their products take the time, or reading all weights for them."""
    products = min(own.count, own.together) * work.per_token() / rates.forward
    one = max(products, file_bytes / rates.read) + _CALL * len(work.blocks)
    return own.passes * one


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
        # Tokens that measure what bits cost.
        self.few = min(tokens.calibration, MEASURED_TOKENS) if measures else 0
        # What is summed up, per block: (parent, K) -> how many sums (one for each expert).
        self.inputs: dict[int | None, dict[tuple[str, int], int]] = {}
        for weight in self.with_data:
            found = self.inputs.setdefault(weight.block, {})
            found[weight.parent, weight.shape[-1]] = weight.experts

    def forward(self) -> float:
        """Operations of all passes through all blocks, and of the head."""
        t, d = self.tokens.calibration, self.tokens.held_out
        passes: float = (3 if self.drifts else 2) * t + 2 * d
        if None not in self.inputs:
            passes -= t / max(1, len(self.blocks))  # nothing goes on behind the last block
        if self.measures:
            groups = sum(map(len, self.inputs.values())) / max(1, len(self.blocks))
            candidates = max(len(weight.recipes) for weight in self.weights)
            passes += t + self.few * (4 + groups * candidates)
        behind = (3 if self.tokens.compared else 1) * d + 3 * self.few
        return passes * self.per_token(head=False) + behind * self._head

    def per_token(self, head: bool = True) -> float:
        """Operations of all blocks for one token, and of the head."""
        attention = 4 * min(self.tokens.longest, _all(self.tokens)) * self.text.hidden_size
        blocks: float = sum(2 * self._met(block) + attention for block in self.blocks)
        return blocks + (self._head if head else 0.0)

    @property
    def _head(self) -> float:
        return float(2 * self.text.hidden_size * self.text.vocab_size)

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
                    turns = _turns(recipe)
                    # Small weights have told about their own products.
                    product = rows * columns * max(0, columns - COLUMNS)
                    turn = 5 if fits_grid(recipe.spec) else 2
                    one += (2 + turn * turns) * product / rates.float32
                    one += _grids(recipe, rows, columns) / rates.factor
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
        batch = min(self.tokens.batch, _all(self.tokens))
        runs = batch * (4 * rows * size + 6 * self.text.hidden_size * size + 4 * widest)
        chooses = 4 * max(_PER_ENTRY * widest**2 + largest, widest**2 + _PER_WEIGHT * largest)
        if self.measures:
            chooses += size * self._largest_group()
        peak: int = block + max(4 * sums + max(runs, chooses), size * self._backward())
        return peak

    def _largest_group(self) -> int:
        """Numbers of the weights that are rounded together while bits are measured."""
        groups: dict[tuple[object, ...], int] = {}
        for each in self.with_data:
            key = each.block, each.parent, each.shape[-1]
            groups[key] = groups.get(key, 0) + math.prod(each.shape)
        return max(groups.values(), default=0)

    def _backward(self) -> int:
        """Numbers that are kept for the gradient of a block: what its layers read and give, and as much around them."""
        if not self.measures:
            return 0
        widths: dict[int | None, int] = {}
        for each in self.with_data:
            met = getattr(self.text, "num_experts_per_tok", 1) if each.experts > 1 else 1
            widths[each.block] = widths.get(each.block, 0) + met * sum(each.shape[-2:])
        longest = min(LONGEST, self.tokens.longest)
        at_once = min(max(self.tokens.batch // BACKWARD, longest), _all(self.tokens))
        return 2 * at_once * max(widths.values(), default=0)

    def logits_memory(self, size: int) -> int:
        """Bytes of the logits alive at a time: two models' of a sequence and a copy, or a batch before its head is packed."""
        held_out = min(self.tokens.longest, self.tokens.held_out) * (3 * size + 8)
        outside = any(weight.block is None for weight in self.with_data)
        batch = min(self.tokens.batch, self.tokens.calibration) * size if outside else 0
        # While gradients are measured: one sequence, in float32.
        drawn = 16 * min(LONGEST, self.tokens.longest) if self.measures else 0
        return max(held_out, batch, drawn) * int(self.text.vocab_size)

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


def _turns(recipe: Recipe) -> int:
    """Of `hfq.core.refine`; 0 for methods that have no second look."""
    return turns_for(recipe.spec, recipe.options.get("refine", 0))


def _grids(recipe: Recipe, rows: int, columns: int) -> float:
    """K^3 of the systems that `refine` solves for the grids of a row, beyond those of small weights."""
    if not fits_grid(recipe.spec):
        return 0.0
    unknowns = [
        (1 if recipe.spec.sym else 2) * group_count(each, recipe.spec.group_size)
        for each in (columns, min(columns, COLUMNS))
    ]
    return float(_turns(recipe) * rows * (unknowns[0] ** 3 - unknowns[1] ** 3))


def _all(tokens: Tokens) -> int:
    return max(tokens.calibration, tokens.held_out)
