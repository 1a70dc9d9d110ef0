"""`hfq.plan`: what `hfq.quantize` would do, before anything is read but names, shapes and sizes.

The skeleton on meta is taken through the same selection, and its modules are replaced by the same packed ones, as in a
run; what would be written is then counted tensor by tensor. Nothing is written.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from ..calibration.blocks import find_blocks
from ..calibration.run import Calibration
from ..calibration.sensitivity import MEASURED_TOKENS
from ..config import HfqConfig, Recipe
from ..core.errors import CheckpointError
from ..core.spec import CodebookSpec, IntSpec, QuantSpec
from ..diagnose.machine import memory, resident_memory
from ..diagnose.rates import measure_rates, recipe_key
from ..evaluation.logits import position_limit
from ..formats import stored_bytes
from ..kernels import dispatch
from ..kernels.row import Problem
from ..table import format_bytes, format_table, without_numbers, wrapped
from .bit_allocation import float_shape
from .calibrated import calibration_sequences
from .checkpoint import file_bytes, read_headers
from .forecast import Forecast, Tokens, Weight, forecast
from .source import FloatCheckpoint
from .streaming import HELD_OUT, is_one_file, stored_tensors

__all__ = ["Plan", "PlannedWeight", "plan"]

# Tokens that the written model is asked where nothing is calibrated.
_PROBE = 16

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def plan(
    model: str | os.PathLike[str],
    config: HfqConfig,
    *,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
) -> Plan:
    """Say what ``hfq.quantize(model, output, config)`` would do, without doing it.

    Reads the checkpoint's config and headers, and the data set if there is one; times small pieces of the work for a
    second or two; writes nothing.

    Args:
        model: folder of a float model (safetensors).
        output: where it would be written; None: the space is not checked.
        dtype, device: as for `hfq.quantize`.

    Raises:
        CheckpointError: the model is missing, incomplete, quantized already or not a float model.
        ConfigError: settings or data cannot be used.
        CalibrationError: the model does not consist of blocks.
    """
    if not Path(model).is_dir():
        raise CheckpointError(
            f"{model} is no folder here: a plan reads local files only; download it first (hf download {model})"
        )
    source = FloatCheckpoint(model, config, dtype, torch.device(device))
    _check_floats(source)
    weights = list(_weights(source, config))
    tokens = _tokens(source, config)
    run = Calibration(source.model, source.quantizer.calibrated, source.quantizer.make_twin, None)
    rates = measure_rates(
        {recipe_key(recipe): recipe for w in weights for recipe in w.recipes}.values(),
        Path(source.files[0]),
        source.dtype,
        source.device,
    )
    before = sum(os.stat(file).st_size for file in source.files)
    kept = before - sum(math.prod(w.shape) * source.dtype.itemsize for w in weights)
    # The forecast needs the float blocks, the sizes need the packed ones.
    estimate = forecast(
        source.model,
        config,
        list(run.blocks.values()),
        weights,
        tokens,
        rates,
        resident_memory(),
        (before, max(0, kept) + sum(_stored(weight, weight.recipes[0]) for weight in weights)),
    )
    after, needed = _sizes(source, config, run, weights, tokens)
    problems = [*_data_problems(config, tokens), *_shape_problems(weights)]
    return Plan(
        model=str(model),
        weights=tuple(_planned(weight, source.device) for weight in weights),
        kept=source.quantizer.selection.kept,
        problems=(*problems, *_resource_problems(output, needed, estimate)),
        bytes_before=before,
        bytes_after=after,
        temporary_bytes=needed,
        tokens=tokens.calibration,
        forecast=estimate,
        settings=config.to_dict(),
    )


# ---- what would be done


def _weights(source: FloatCheckpoint, config: HfqConfig) -> Iterator[Weight]:
    """Every weight that would be packed, in the order of the model."""
    blocks = [f"{name}." for name in find_blocks(source.model)]
    for module, recipes in source.quantizer.selection.recipes.items():
        block = next((n for n, prefix in enumerate(blocks) if module.startswith(prefix)), None)
        for base, recipe in recipes.items():
            name = module if base == "weight" else f"{module}.{base}"
            is_open = config.target_bits is not None and block is not None
            choices: tuple[Recipe, ...] = (recipe,)
            if is_open and isinstance(recipe.spec, IntSpec) and not config.fixes_bits(name):
                choices = tuple(
                    replace(recipe, spec=replace(recipe.spec, bits=bits))
                    for bits in config.candidate_bits or ()
                )
            yield Weight(
                name=name,
                parent=module.rpartition(".")[0],
                block=block,
                shape=float_shape(source.model.get_submodule(module), base),
                recipes=choices,
                with_data=module in source.quantizer.calibrated,
            )


def _planned(weight: Weight, device: torch.device) -> PlannedWeight:
    rows, columns = weight.shape[-2:]
    found = [_kernel(recipe.spec, rows, columns, device) for recipe in weight.recipes]
    first = weight.recipes[0]
    return PlannedWeight(
        name=weight.name,
        method=first.method,
        format=first.format,
        bits=tuple(recipe.spec.bits for recipe in weight.recipes),
        group_size=first.spec.group_size,
        shape=weight.shape,
        kernels=tuple(choice.row.name for choice in found),
        refused=tuple(dict.fromkeys(refusal for choice in found for refusal in choice.refused)),
    )


def _kernel(spec: QuantSpec, rows: int, columns: int, device: torch.device) -> dispatch.Choice:
    problem = Problem(
        device=device.type,
        bits=spec.bits,
        group_size=columns if spec.group_size == -1 else spec.group_size,
        in_features=columns,
        out_features=rows,
        has_codebook=isinstance(spec, CodebookSpec),
        has_g_idx=False,
    )
    return dispatch.select(problem)


def _tokens(source: FloatCheckpoint, config: HfqConfig) -> Tokens:
    """Of the data set; without one as many as the settings allow."""
    if not source.quantizer.calibrated:
        return Tokens(calibration=0, held_out=_PROBE, longest=_PROBE)
    if config.dataset is None or (isinstance(config.dataset, str) and config.dataset == "self"):
        limit = position_limit(source.model) or config.seqlen
        seqlen = min(config.seqlen, limit)
        count = config.num_samples * seqlen
        return Tokens(calibration=count, held_out=HELD_OUT * seqlen, longest=seqlen)
    chosen, others = calibration_sequences(source.model, config)
    return Tokens(
        calibration=sum(map(len, chosen)),
        held_out=sum(map(len, others[:HELD_OUT])),
        longest=max(map(len, chosen)),
    )


# ---- sizes


def _sizes(
    source: FloatCheckpoint,
    config: HfqConfig,
    run: Calibration,
    weights: list[Weight],
    tokens: Tokens,
) -> tuple[int, int]:
    """Bytes of the safetensors files, and of all files at the peak of the run. Packs the skeleton."""
    names = list(run.blocks)
    for index in range(len(names)):
        run.skip(index)
    run.skip_rest()
    # As the loader leaves it: names in the files may be others than in the model.
    vars(source.model)["_weight_conversions"] = get_model_conversion_mapping(source.model)
    inside = tuple(f"{name}." for name in names)
    parts = [
        stored_tensors(source.model, source.quantizer, inside, prefix) for prefix in (*names, "")
    ]
    files = [file_bytes(part) for part in parts]
    blocks, rest = sum(files[:-1]), sum(tensor.nbytes for tensor in parts[-1].values())
    single = is_one_file(blocks + rest)
    after = file_bytes({k: t for part in parts for k, t in part.items()}) if single else sum(files)
    if config.target_bits is not None:
        total = sum(math.prod(weight.shape) for weight in weights)
        now = sum(_stored(weight, _stored_now(source, weight)) for weight in weights)
        after += math.floor(config.target_bits * total / 8) - now
    hidden = source.model.config.get_text_config().hidden_size * source.dtype.itemsize
    drifts = 2 if any(weight.recipes[0].options.get("gptaq") for weight in weights) else 1
    streams = (drifts * tokens.calibration + 2 * tokens.held_out) * hidden
    # The streams of the last block are there until those of the next one are complete.
    peak = max(blocks + 2 * streams, blocks + streams + (after if single else files[-1]))
    if config.target_bits is not None:
        few = min(MEASURED_TOKENS, tokens.calibration) * hidden
        peak += few * len(names) + 2 * (tokens.calibration * hidden + few)
    return after, peak


def _stored(weight: Weight, recipe: Recipe) -> int:
    return stored_bytes(recipe.format, recipe.spec, weight.shape)


def _stored_now(source: FloatCheckpoint, weight: Weight) -> Recipe:
    """The recipe that the skeleton was packed with, whatever `target_bits` will choose."""
    known = source.quantizer.selection.recipes
    if weight.name in known:
        return known[weight.name]["weight"]
    module, _, base = weight.name.rpartition(".")
    return known[module][base]


# ---- what is in the way


def _check_floats(source: FloatCheckpoint) -> None:
    """Weights that would be packed must be floats in the files, and have the shape that the model expects.

    Raises:
        CheckpointError: they are not.
    """
    headers, parts = read_headers(source.files), Counter(source.parameters.values())
    expected: dict[str, Tensor] = source.model.state_dict()
    for key, name in source.parameters.items():
        found, module = headers[key], name.rpartition(".")[0]
        is_packed = module in source.quantizer.selection.recipes
        if is_packed and found.dtype not in _FLOATS:
            raise CheckpointError(
                f"{key} is stored as {found.dtype}: expected a float checkpoint; start from the model that this one was "
                "made from"
            )
        if parts[name] == 1 and name in expected and module in source.quantizer.calibrated:
            shape = tuple(expected[name].shape)
            if shape != found.shape:
                raise CheckpointError(
                    f"{key} has shape {found.shape}, the model in config.json expects {shape}: the files do not belong "
                    "together"
                )


def _data_problems(config: HfqConfig, tokens: Tokens) -> Iterator[str]:
    if tokens.calibration and (config.dataset is None or config.dataset == "self"):
        yield (
            f"method {config.method!r} needs calibration text (dataset=..., --dataset); figures are for the most that "
            "num_samples and seqlen allow"
        )
    elif tokens.calibration and not tokens.held_out:
        yield "all of the data set is calibrated with: nothing is left to compare the models on; give more or lower num_samples"


def _shape_problems(weights: list[Weight]) -> Iterator[str]:
    """Group sizes that do not suit: those weights are packed all the same."""
    odd: dict[tuple[int, int], list[str]] = {}
    for weight in weights:
        size, columns = weight.recipes[0].spec.group_size, weight.shape[-1]
        if size != -1 and columns % size:
            odd.setdefault((size, columns), []).append(weight.name)
    for (size, columns), names in odd.items():
        what = "one group" if size > columns else f"a last group of {columns % size}"
        yield (
            f"group_size {size} does not divide the {columns} columns of {len(names)} weights such as "
            f"{without_numbers(names[0])}: rows get {what}"
        )


def _resource_problems(
    output: str | os.PathLike[str] | None, needed: int, estimate: Forecast
) -> Iterator[str]:
    known = memory()
    if known is not None and estimate.peak_memory > known[1]:
        yield (
            f"memory: {format_bytes(estimate.peak_memory)} predicted, {format_bytes(known[1])} available: lower "
            "num_samples or seqlen, or take another machine"
        )
    if output is None:
        return
    place = Path(os.path.abspath(output))
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        yield f"{place} is a file: choose another output"
        return
    if not os.access(place, os.W_OK | os.X_OK):
        yield f"{place} cannot be written to: choose another output or change its permissions"
    free = shutil.disk_usage(place).free
    if free < needed:
        yield (
            f"disk: {format_bytes(needed)} needed at the peak, {format_bytes(free)} free in {place}: free space or choose "
            "another output"
        )


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
