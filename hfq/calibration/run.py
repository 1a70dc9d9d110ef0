"""Quantize a model block by block: what comes out of a quantized block is what the next one is calibrated with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..algorithms import ALGORITHMS, find_method
from ..config import Recipe
from ..core.errors import HfqError
from ..core.statistics import InputStatistics
from ..core.weight import QuantizedWeight
from ..formats import FORMATS
from ..nn.experts import is_fused_experts, pack_experts_
from ..nn.packed import PackedModule
from .blocks import BlockCall, find_blocks, record_calls, run_after_blocks, run_block
from .capture import Capture, recording
from .experts import ExpertsCapture
from .fold import Folds
from .report import CalibrationReport, WeightReport
from .rescale import rescale_block

__all__ = [
    "Calibration",
    "Progress",
    "Stream",
    "calibrate",
    "choose_codes",
    "fingerprint",
    "orientations",
]

# Tokens that run through a block at a time.
_BATCH_TOKENS = 8192

# Tokens that experiments with a block are made on.
_PROBE_TOKENS = 16

# Rows of a weight that its error is measured on.
_ERROR_ROWS = 256

# Module name -> stack or "weight" -> recipe.
Recipes = Mapping[str, Mapping[str, Recipe]]

# Makes the packed twin of a float module, values still to be set.
MakeTwin = Callable[[nn.Module, Recipe], PackedModule]

# Told about each weight when it is done: its report, how many are done, how many there are.
Progress = Callable[[WeightReport, int, int], None]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    recipes: Recipes,
    sequences: Sequence[Tensor],
    make_twin: MakeTwin,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Replace modules of a float model by packed ones, with data.

    Args:
        model: a causal language model in evaluation mode, with its weights in memory.
        recipes: what to do with which weight.
        sequences: token ids int64 `[T]`.

    Raises:
        CalibrationError: the model does not run block by block, or what a weight reads is NaN or infinite; the model is
            half quantized then.
    """
    run = Calibration(model, recipes, make_twin, progress)
    streams = run.start(sequences)
    for index in range(len(run.blocks)):
        run.block(index, streams)
    run.rest(streams)
    return run.report(sequences)


@dataclass
class Stream:
    """One batch on its way through the blocks.

    Attributes:
        batch: token ids int64 `[B, T]`.
        calls: what each block is called with beside the hidden states.
        hidden: what enters the next block, `[B, T, H]`.
        wanted: what enters it in the float model, where the two are compared; else the same as `hidden`.
    """

    batch: Tensor
    calls: list[BlockCall]
    hidden: Tensor
    wanted: Tensor


class Calibration:
    """One model that is calibrated block by block.

    Attributes:
        blocks: full name -> block; weights need to be in memory only while `block` works on them.
        reports: of the weights that are done.
    """

    def __init__(
        self, model: nn.Module, recipes: Recipes, make_twin: MakeTwin, progress: Progress | None
    ) -> None:
        self.model, self.recipes, self.make_twin, self.progress = (
            model,
            recipes,
            make_twin,
            progress,
        )
        self.blocks = find_blocks(model)
        self.reports: list[WeightReport] = []
        # A few tokens on their way through the blocks, for experiments with a block; made by `start`.
        self._probe: Stream | None = None

    def start(self, sequences: Sequence[Tensor], tokens: int = _BATCH_TOKENS) -> list[Stream]:
        """All batches of at most so many tokens in front of the first block. Needs the weights before it only."""
        device = next(p.device for p in self.model.parameters() if not p.is_meta)
        blocks = list(self.blocks.values())
        streams = []
        for batch in _batches(sequences, device, tokens):
            hidden, calls = record_calls(self.model, blocks, batch)
            streams.append(Stream(batch, calls, hidden, hidden))
        if streams and self._probe is None:
            few = streams[0].batch[:1, :_PROBE_TOKENS]
            hidden, calls = record_calls(self.model, blocks, few)
            self._probe = Stream(few, calls, hidden, hidden)
        return streams

    @torch.no_grad()
    def block(
        self, index: int, streams: Sequence[Stream], followers: Sequence[Stream] = ()
    ) -> None:
        """Calibrate and replace what is inside a block, then move all streams past it.

        Args:
            followers: streams that nothing is calibrated with; they run through the float model as well.
        """
        name, block = list(self.blocks.items())[index]
        names = [each for each in self.recipes if each.startswith(f"{name}.")]
        with self.captured(names) as (capture, routed):
            for stream in streams if names or self.follows_drift else ():
                call, beside = stream.calls[index], None
                if self.follows_drift:
                    with _paused(capture, *routed.values()), recording(capture.modules) as beside:
                        stream.wanted = run_block(block, stream.wanted, call)
                capture.next_batch(beside)
                run_block(block, stream.hidden, call)
        for stream in followers:
            stream.wanted = run_block(block, stream.wanted, stream.calls[index])
        self._quantize(capture, routed, index)
        for stream in (*streams, *followers):
            stream.hidden = run_block(block, stream.hidden, stream.calls[index])
        if not self.follows_drift:
            # Nothing is compared: what entered the first block would only take memory, and space on disk.
            for stream in streams:
                stream.wanted = stream.hidden

    def skip(self, index: int) -> None:
        """Replace what is inside a block on meta, without values: it was done in another run."""
        name, block = list(self.blocks.items())[index]
        self._replace_empty([each for each in self.recipes if each.startswith(f"{name}.")])
        for module in block.modules():
            if isinstance(module, PackedModule):
                for base in module.slots:
                    module.drop_placeholder(base)

    def skip_rest(self) -> None:
        """The same outside of the blocks."""
        inside = tuple(f"{name}." for name in self.blocks)
        self._replace_empty([each for each in self.recipes if not each.startswith(inside)])
        for name, module in self.model.named_modules():
            if isinstance(module, PackedModule) and not name.startswith(inside):
                for base in module.slots:
                    module.drop_placeholder(base)

    def _replace_empty(self, names: Sequence[str]) -> None:
        for each in names:
            module, recipes = self.model.get_submodule(each), self.recipes[each]
            if is_fused_experts(module):
                plan = {base: (recipe.format, recipe.spec) for base, recipe in recipes.items()}
                pack_experts_(module, plan, dtype=next(module.parameters()).dtype)
            else:
                self.model.set_submodule(each, self.make_twin(module, recipes["weight"]))

    @torch.no_grad()
    def rest(self, streams: Sequence[Stream]) -> None:
        """Calibrate and replace what stands outside of the blocks: an output head."""
        inside = tuple(f"{name}." for name in self.blocks)
        names = [each for each in self.recipes if not each.startswith(inside)]
        if not names:
            return
        with self.captured(names) as (capture, routed):
            for stream in streams:
                capture.next_batch()
                run_after_blocks(
                    self.model, list(self.blocks.values()), stream.batch, stream.hidden
                )
        self._quantize(capture, routed)

    def report(self, sequences: Sequence[Tensor]) -> CalibrationReport:
        """What was done so far."""
        return CalibrationReport(
            weights=self.reports,
            sequences=len(sequences),
            tokens=sum(map(len, sequences)),
            sha256=fingerprint(sequences),
        )

    @property
    def follows_drift(self) -> bool:
        """Whether the float model runs beside the quantized one."""
        return any(
            recipe.options.get("gptaq")
            for each in self.recipes.values()
            for recipe in each.values()
        )

    @contextmanager
    def captured(self, names: Sequence[str]) -> Iterator[tuple[Capture, dict[str, ExpertsCapture]]]:
        """Within, the inputs of these modules are summed up: those with one weight, and fused experts by name."""
        modules = {name: self.model.get_submodule(name) for name in names}
        experts = {name: module for name, module in modules.items() if is_fused_experts(module)}
        linear = {name: module for name, module in modules.items() if name not in experts}
        with ExitStack() as stack:
            capture = stack.enter_context(Capture(linear))
            yield (
                capture,
                {name: stack.enter_context(ExpertsCapture(m)) for name, m in experts.items()},
            )

    # ---- choosing codes

    def _quantize(
        self, capture: Capture, routed: Mapping[str, ExpertsCapture], index: int | None = None
    ) -> None:
        """Choose codes for what was captured in block `index`, or outside of the blocks."""
        statistics, folds = capture.statistics(), Folds()
        notes: dict[str, str] = {}
        if index is not None and self._probe is not None:
            folds, notes = self._rescale(index, statistics)
        for name, known in statistics.items():
            self._linear(name, known, folds, notes.get(name, ""))
        for name, experts in routed.items():
            self._experts(name, experts)

    def _rescale(
        self, index: int, statistics: dict[str, InputStatistics | None]
    ) -> tuple[Folds, dict[str, str]]:
        """Transforms of a block; what was folded, and a note for each weight. Replaces its entries of `statistics`."""
        assert self._probe is not None
        prefix, block = list(self.blocks.items())[index]
        start = len(prefix) + 1
        inside = {name[start:]: known for name, known in statistics.items()}
        recipes = {name: self.recipes[f"{prefix}.{name}"]["weight"] for name in inside}
        folds, producers = rescale_block(
            block,
            recipes,
            inside,
            orientations(block),
            self._probe.calls[index],
            self._probe.hidden,
        )
        statistics.update({f"{prefix}.{name}": known for name, known in inside.items()})
        notes = {f"{prefix}.{name}": f"scaled with {by}" for name, by in producers.items()}
        return folds.within(prefix), notes

    def _linear(
        self, name: str, statistics: InputStatistics | None, folds: Folds, note: str
    ) -> None:
        recipe = self.recipes[name]["weight"]
        module = self.model.get_submodule(name)
        twin = self.make_twin(module, recipe)
        slot = twin.slots["weight"]
        stored = module.get_parameter("weight").detach()
        weight = folds.weight(name, stored, slot.transposed)
        start = time.perf_counter()
        quantized, method = choose_codes(name, weight, recipe, statistics)
        twin.set_packed("weight", FORMATS.get(slot.format).pack(quantized))
        self._report(
            name, method, [statistics], [_error(weight, quantized, statistics)], start, note
        )
        self.model.set_submodule(name, twin)

    def _experts(self, name: str, capture: ExpertsCapture) -> None:
        module = self.model.get_submodule(name)
        recipes, statistics = self.recipes[name], capture.statistics()
        note = f"{len(capture.topped_up)} experts topped up" if capture.topped_up else ""
        floats = {base: module.get_parameter(base).detach() for base in recipes}
        packed: dict[str, dict[str, Tensor]] = {}
        plan = {base: (recipe.format, recipe.spec) for base, recipe in recipes.items()}
        for base, recipe in recipes.items():
            start = time.perf_counter()
            known = statistics[base]
            tensors, errors = [], []
            for expert, stored in enumerate(floats[base]):
                weight = (stored.T if module.is_transposed else stored).float()
                seen = None if known is None else known[expert]
                quantized, method = choose_codes(f"{name}.{base}[{expert}]", weight, recipe, seen)
                tensors.append(FORMATS.get(recipe.format).pack(quantized))
                errors.append(_error(weight, quantized, seen))
            packed[base] = {key: torch.stack([each[key] for each in tensors]) for key in tensors[0]}
            self._report(f"{name}.{base}", method, known or [None], errors, start, note)
        twin = pack_experts_(module, plan, dtype=next(iter(floats.values())).dtype)
        for base, stacks in packed.items():
            twin.set_packed(base, stacks)

    def _report(
        self,
        name: str,
        method: str,
        statistics: Sequence[InputStatistics | None],
        errors: Sequence[float | None],
        start: float,
        note: str = "",
    ) -> None:
        known = [each for each in statistics if each is not None]
        measured = [error for error in errors if error is not None]
        report = WeightReport(
            name=name,
            method=method,
            tokens=sum(each.tokens for each in known) // max(len(known), 1),
            error=sum(measured) / len(measured) if measured else None,
            damping=max((each.damping for each in known), default=0.0),
            seconds=time.perf_counter() - start,
            note=note if known else "never ran on the calibration data",
        )
        self.reports.append(report)
        if self.progress is not None:
            total = sum(len(each) for each in self.recipes.values())
            self.progress(report, len(self.reports), total)


def choose_codes(
    name: str, weight: Tensor, recipe: Recipe, statistics: InputStatistics | None
) -> tuple[QuantizedWeight, str]:
    """Codes for float32 `[N, K]`, and the method that chose them.

    A weight that has seen nothing (a layer that never ran) is rounded to nearest on the best grid.
    """
    method, algorithm, options = (
        recipe.method,
        find_method(recipe.method).algorithm,
        recipe.options,
    )
    if statistics is None and ALGORITHMS.get(algorithm).calibrated:
        method = algorithm = "rtn"
        options = {"scale_search": True}
    try:
        return ALGORITHMS.get(algorithm).quantize(weight, recipe.spec, options, statistics), method
    except HfqError as error:
        raise type(error)(f"{name}: {error}") from error


def orientations(block: nn.Module) -> dict[str, bool]:
    """Every linear layer of a block -> whether its weight is `[K, N]`."""
    found = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = False
        elif type(module).__name__ == "Conv1D" and "weight" in module._parameters:
            found[name] = True
    return found


@contextmanager
def _paused(*captures: Capture | ExpertsCapture) -> Iterator[None]:
    for capture in captures:
        capture.enabled = False
    yield
    for capture in captures:
        capture.enabled = True


def _error(
    weight: Tensor, quantized: QuantizedWeight, statistics: InputStatistics | None
) -> float | None:
    """Squared error of the output over the squared output, on some of the rows."""
    if statistics is None or not weight.numel():
        return None
    step = max(1, len(weight) // _ERROR_ROWS)
    rows = weight[::step]
    whole = statistics.error(rows)
    wrong = statistics.error(quantized.dequantize()[::step] - rows)
    return wrong / whole if whole else 0.0


def _batches(sequences: Sequence[Tensor], device: torch.device, tokens: int) -> list[Tensor]:
    """Sequences of one length together, so that nothing has to be padded: int64 `[B, T]`."""
    by_length: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    batches = []
    for length, equal in by_length.items():
        size = max(1, tokens // length)
        batches += [
            torch.stack(equal[start : start + size]).to(device)
            for start in range(0, len(equal), size)
        ]
    return batches


def fingerprint(sequences: Sequence[Tensor]) -> str:
    """SHA-256 of token sequences."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.cpu().numpy().tobytes())
    return digest.hexdigest()
