"""Quantize a model block by block: what comes out of a quantized block is what the next one is calibrated with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Recipe
from ..core.statistics import InputStatistics
from ..formats import FORMATS
from ..kernels import native
from ..nn.experts import expert_weights, is_fused_experts, pack_experts_
from ..nn.packed import PackedModule
from .blocks import BlockCall, find_blocks, record_calls, run_after_blocks, run_block
from .capture import Capture, EverythingRead, recording
from .choose import choose_codes, relative_error
from .experts import ExpertsCapture
from .fold import Folds
from .ranks import ALONE, ProcessError, Ranks
from .report import CalibrationReport, WeightReport
from .rescale import rescale_block
from .sequences import MOST_TOKENS, batches, by_length, fingerprint, token_draws

__all__ = ["Calibration", "Progress", "Stream", "calibrate", "orientations", "weight_names"]

# Tokens that experiments with a block are made on.
_PROBE_TOKENS = 16

# Module name -> stack or "weight" -> recipe.
Recipes = Mapping[str, Mapping[str, Recipe]]

# Makes the packed twin of a float module, values still to be set.
MakeTwin = Callable[[nn.Module, Recipe], PackedModule]

# Told about each weight when it is done: its report, the cost of what this run has done and of what is left (`_cost`).
Progress = Callable[[WeightReport, float, float], None]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    recipes: Recipes,
    sequences: Sequence[Tensor],
    make_twin: MakeTwin,
    progress: Progress | None = None,
    batch_tokens: int = MOST_TOKENS,
) -> CalibrationReport:
    """Replace modules of a float model by packed ones, with data.

    Args:
        model: a causal language model in evaluation mode, with its weights in memory.
        recipes: what to do with which weight.
        sequences: token ids int64 `[T]`.
        batch_tokens: how many run through a block at a time, at least one sequence.

    Raises:
        CalibrationError: the model does not run block by block, or what a weight reads is NaN or infinite; the model is
            half quantized then.
    """
    run = Calibration(model, recipes, make_twin, progress)
    streams = run.start(sequences, batch_tokens)
    for index in range(len(run.blocks)):
        run.block(index, streams)
    run.rest(streams)
    return run.report(sequences)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Packed codes of one weight `[N, K]`, and what there is to tell about them; see `WeightReport`."""

    packed: dict[str, Tensor]
    method: str
    error: float | None
    damping: float
    seconds: float


@dataclass
class Stream:
    """One batch on its way through the blocks.

    Attributes:
        batch: token ids int64 `[B, T]`.
        calls: what each block is called with beside the hidden states.
        hidden: what enters the next block, `[B, T, H]`.
        wanted: what enters it in the float model, where the two are compared; else the same as `hidden`.
        draws: a random number for each token, `[B, T]`: the tokens with the least are kept as a sample.
    """

    batch: Tensor
    calls: list[BlockCall]
    hidden: Tensor
    wanted: Tensor
    draws: Tensor


class Calibration:
    """One model that is calibrated block by block.

    With several processes every one has the model and comes to each method with the same arguments.

    Attributes:
        blocks: full name -> block; weights need to be in memory only while `block` works on them.
        outside: modules to be quantized that stand in no block.
        reports: of the weights that are done.
    """

    def __init__(
        self,
        model: nn.Module,
        recipes: Recipes,
        make_twin: MakeTwin,
        progress: Progress | None,
        ranks: Ranks = ALONE,
    ) -> None:
        native.load()  # codes are chosen by its code, too
        self.model, self.recipes, self.make_twin = model, recipes, make_twin
        self.progress, self.ranks = progress, ranks
        self.blocks = find_blocks(model)
        inside = tuple(f"{name}." for name in self.blocks)
        self.outside = [name for name in recipes if not name.startswith(inside)]
        self.reports: list[WeightReport] = []
        self._costs = _costs(model, recipes)
        self._spent = 0.0
        # A few tokens on their way through the blocks, for experiments with a block; made by `start`.
        self._probe: Stream | None = None

    def start(
        self,
        sequences: Sequence[Tensor],
        batch_tokens: int = MOST_TOKENS,
        *,
        divided: bool = True,
    ) -> list[Stream]:
        """This process's batches in front of the first block. Needs the weights before it only.

        Args:
            sequences: of all processes.
            batch_tokens: how many run through a block at a time, at least one sequence. Sums are rounded in another
                order with another number.
            divided: this process gets its share of the sequences; False: all of them.
        """
        with self.ranks.together():
            device = next(p.device for p in self.model.parameters() if not p.is_meta)
            ordered = by_length(sequences)
            part = self.ranks.part if divided else list
            split = batches(part(ordered), batch_tokens)
            draws = batches(part(token_draws(ordered)), batch_tokens)
            streams = [
                self._stream(batch.to(device), drawn)
                for batch, drawn in zip(split, draws, strict=True)
            ]
            if sequences and self._probe is None:
                few = sequences[0][None, :_PROBE_TOKENS]
                self._probe = self._stream(few.to(device), torch.zeros(few.shape))
        return streams

    def _stream(self, batch: Tensor, draws: Tensor) -> Stream:
        hidden, calls = record_calls(self.model, list(self.blocks.values()), batch)
        return Stream(batch, calls, hidden, hidden, draws)

    @torch.no_grad()
    def block(
        self, index: int, streams: Sequence[Stream], followers: Sequence[Stream] = ()
    ) -> None:
        """Calibrate and replace what is inside a block, then move all streams past it if anything is left to calibrate.

        Args:
            followers: streams that nothing is calibrated with; they run through the float model as well, and past every
                block.
        """
        name, block = list(self.blocks.items())[index]
        names = [each for each in self.recipes if each.startswith(f"{name}.")]
        with self.ranks.together():
            with self.captured(names, cuts=True) as (capture, routed):
                for stream in streams if names or self.follows_drift else ():
                    call, beside = stream.calls[index], None
                    if self.follows_drift:
                        with (
                            _paused(capture, *routed.values()),
                            recording(capture.modules) as beside,
                        ):
                            stream.wanted = run_block(block, stream.wanted, call)
                    capture.next_batch(beside, stream.draws.flatten())
                    for experts in routed.values():
                        experts.draws = stream.draws.flatten()
                    with suppress(EverythingRead):
                        run_block(block, stream.hidden, call)
            for stream in followers:
                stream.wanted = run_block(block, stream.wanted, stream.calls[index])
        self._quantize(capture, routed, index)
        # What comes out of the last block is of use to what stands behind it only.
        done = index == len(self.blocks) - 1 and not self.outside
        with self.ranks.together():
            for stream in followers if done else (*streams, *followers):
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
        self._replace_empty(self.outside)
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
        if not self.outside:
            return
        with self.ranks.together(), self.captured(self.outside, cuts=True) as (capture, routed):
            for stream in streams:
                capture.next_batch(draws=stream.draws.flatten())
                with suppress(EverythingRead):
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
    def captured(
        self, names: Sequence[str], cuts: bool = False
    ) -> Iterator[tuple[Capture, dict[str, ExpertsCapture]]]:
        """Within, the inputs of these modules are summed up: those with one weight, and fused experts by name.

        Args:
            cuts: passes may end where nothing is left to sum up; see `Capture`.
        """
        modules = {name: self.model.get_submodule(name) for name in names}
        recipes = [recipe for name in names for recipe in self.recipes[name].values()]
        sampled = any(recipe.sampled for recipe in recipes)
        experts = {name: module for name, module in modules.items() if is_fused_experts(module)}
        linear = {name: module for name, module in modules.items() if name not in experts}
        with ExitStack() as stack:
            capture = stack.enter_context(Capture(linear, sampled, cuts and not experts))
            yield (
                capture,
                {
                    name: stack.enter_context(ExpertsCapture(module, sampled))
                    for name, module in experts.items()
                },
            )

    # ---- choosing codes

    def _quantize(
        self, capture: Capture, routed: Mapping[str, ExpertsCapture], index: int | None = None
    ) -> None:
        """Choose codes for what was captured in block `index`, or outside of the blocks."""
        capture.sum_over(self.ranks)
        for experts in routed.values():
            experts.sum_over(self.ranks)
        folds, notes = Folds(), dict[str, str]()
        with self.ranks.together():
            statistics = capture.statistics()
            if index is not None and self._probe is not None:
                folds, notes = self._rescale(index, statistics)
        self._agree(folds)
        self._linears(statistics, folds, notes)
        for name, experts in routed.items():
            self._experts(name, experts, folds)

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

    def _agree(self, folds: Folds) -> None:
        """Factors come from the same sums by the same code; machines of two kinds may still round otherwise."""
        digest = hashlib.sha256()
        for tensor in (*folds.rows.values(), *folds.columns.values()):
            digest.update(tensor.cpu().numpy().tobytes())
        if len(set(self.ranks.gather(digest.hexdigest()))) > 1:
            raise ProcessError(
                "the processes came to different factors for rescaling: run all of them on machines of one kind, or a "
                "single one"
            )

    def _linears(
        self,
        statistics: Mapping[str, InputStatistics | None],
        folds: Folds,
        notes: Mapping[str, str],
    ) -> None:
        names = list(statistics)
        modules = {name: self.model.get_submodule(name) for name in names}
        twins = {
            name: self.make_twin(modules[name], self.recipes[name]["weight"]) for name in names
        }

        def choose(index: int) -> _Chosen:
            name = names[index]
            stored = modules[name].get_parameter("weight").detach()
            weight = folds.weight(name, stored, twins[name].slots["weight"].transposed)
            return self._choose(name, weight, self.recipes[name]["weight"], statistics[name])

        costs = [_cost(*twins[name].slots["weight"].float_shape) for name in names]
        for name, chosen in zip(names, self.ranks.divided(costs, choose), strict=True):
            device = modules[name].get_parameter("weight").device
            packed = {key: tensor.to(device) for key, tensor in chosen.packed.items()}
            twins[name].set_packed("weight", packed)
            self._report(name, [statistics[name]], [chosen], notes.get(name, ""))
            self.model.set_submodule(name, twins[name])

    def _experts(self, name: str, capture: ExpertsCapture, folds: Folds) -> None:
        module = self.model.get_submodule(name)
        recipes = self.recipes[name]
        with self.ranks.together():
            statistics = capture.statistics()
        known = statistics[capture.first]
        if known is not None and name in folds.columns:
            # They read what a transform has rescaled for other layers.
            factors = folds.columns[name]
            statistics[capture.first] = [each.rescaled(factors) for each in known]
        note = f"{len(capture.topped_up)} experts topped up" if capture.topped_up else ""
        floats = {base: module.get_parameter(base).detach() for base in recipes}
        packed: dict[str, dict[str, Tensor]] = {}
        for base, recipe in recipes.items():
            stack, known = floats[base], statistics[base]

            def choose(
                expert: int,
                base: str = base,
                recipe: Recipe = recipe,
                stack: Tensor = stack,
                known: Sequence[InputStatistics] | None = known,
            ) -> _Chosen:
                weight = (stack[expert].T if module.is_transposed else stack[expert]).float()
                seen = None if known is None else known[expert]
                return self._choose(f"{name}.{base}[{expert}]", weight, recipe, seen)

            chosen = list(self.ranks.divided([1.0] * len(stack), choose))
            packed[base] = {
                key: torch.stack([each.packed[key] for each in chosen]).to(stack.device)
                for key in chosen[0].packed
            }
            self._report(f"{name}.{base}", known or [None], chosen, note)
        plan = {base: (recipe.format, recipe.spec) for base, recipe in recipes.items()}
        twin = pack_experts_(module, plan, dtype=next(iter(floats.values())).dtype)
        for base, stacks in packed.items():
            twin.set_packed(base, stacks)

    def _choose(
        self, name: str, weight: Tensor, recipe: Recipe, statistics: InputStatistics | None
    ) -> _Chosen:
        start = time.perf_counter()
        quantized, method = choose_codes(name, weight, recipe, statistics)
        packed = FORMATS.get(recipe.format).pack(quantized)
        if self.ranks.size > 1:
            packed = {key: tensor.cpu() for key, tensor in packed.items()}
        return _Chosen(
            packed=packed,
            method=method,
            error=relative_error(weight, quantized, statistics),
            damping=0.0 if statistics is None else statistics.damping,
            seconds=time.perf_counter() - start,
        )

    def _report(
        self,
        name: str,
        statistics: Sequence[InputStatistics | None],
        chosen: Sequence[_Chosen],
        note: str,
    ) -> None:
        known = [each for each in statistics if each is not None]
        errors = [each.error for each in chosen if each.error is not None]
        report = WeightReport(
            name=name,
            method=chosen[-1].method,
            tokens=sum(each.tokens for each in known) // max(len(known), 1),
            error=sum(errors) / len(errors) if errors else None,
            damping=max(each.damping for each in chosen),
            seconds=sum(each.seconds for each in chosen),
            note=note if known else "never ran on the calibration data",
        )
        self.reports.append(report)
        self._spent += self._costs[name]
        if self.progress is not None:
            done = sum(self._costs[each.name] for each in self.reports)
            self.progress(report, self._spent, sum(self._costs.values()) - done)


def weight_names(recipes: Recipes) -> list[str]:
    """As reports call them: the module, for a stack of experts with the stack's name."""
    return [
        name if base == "weight" else f"{name}.{base}"
        for name, each in recipes.items()
        for base in each
    ]


def _costs(model: nn.Module, recipes: Recipes) -> dict[str, float]:
    """By the names of `weight_names`."""
    found: dict[str, float] = {}
    for name in recipes:
        module = model.get_submodule(name)
        if is_fused_experts(module):
            for base, (experts, rows, columns) in expert_weights(module).items():
                found[f"{name}.{base}"] = experts * _cost(rows, columns)
        else:
            rows, columns = module.get_parameter("weight").shape
            transposed = not isinstance(module, (nn.Linear, nn.Embedding))
            found[name] = _cost(columns, rows) if transposed else _cost(rows, columns)
    return found


def _cost(rows: int, columns: int) -> float:
    """Of choosing codes column by column, up to a factor."""
    return float(rows) * columns * columns


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
