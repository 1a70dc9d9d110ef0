"""`hfq.plan`: what `hfq.quantize` would do, before anything is read but names, shapes and sizes.

The skeleton on meta is taken through the same selection, and its modules are replaced by the same packed ones, as in a
run; what would be written is then counted tensor by tensor. Nothing is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from ..calibration.blocks import find_blocks
from ..calibration.run import Calibration
from ..calibration.sensitivity import MEASURED_TOKENS
from ..config import HfqConfig, Recipe
from ..core.errors import CheckpointError
from ..core.spec import IntSpec
from ..diagnose.machine import resident_memory
from ..diagnose.rates import measure_rates, recipe_key
from ..formats import FORMATS, stored_bytes
from ..kernels import dispatch
from ..kernels.row import Problem
from .batching import batch_tokens
from .bit_allocation import float_shape
from .calibrated import HELD_OUT, calibration_sequences, of_its_own
from .checkpoint import file_bytes
from .forecast import Tokens, Weight, forecast
from .obstacles import check_floats, data_problems, resource_problems, shape_problems
from .own_text import OwnText, own_text
from .plan_report import Plan, PlannedWeight
from .source import FloatCheckpoint
from .streaming import is_one_file, stored_tensors

__all__ = ["plan"]

# Tokens that the written model is asked where no text is held out.
_PROBE = 16

# Bytes of JSON in the manifest for each tensor before and after; the files around the weights are smaller.
_DESCRIBED = 250


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
    check_floats(source)
    weights = list(_weights(source, config))
    run = Calibration(source.model, source.quantizer.calibrated, source.quantizer.make_twin, None)
    own = own_text(source, config) if source.quantizer.calibrated and of_its_own(config) else None
    tokens = _tokens(source, config, own, bool(run.outside))
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
        own,
    )
    after, needed = _sizes(source, config, run, weights, tokens, own)
    problems = [*data_problems(tokens, own), *shape_problems(weights)]
    return Plan(
        model=str(model),
        weights=tuple(_planned(weight, source.device) for weight in weights),
        kept=source.quantizer.selection.kept,
        problems=(*problems, *resource_problems(output, needed, estimate)),
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
    found = [_kernel(recipe, rows, columns, device) for recipe in weight.recipes]
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


def _kernel(recipe: Recipe, rows: int, columns: int, device: torch.device) -> dispatch.Choice:
    packed = FORMATS.get(recipe.format)
    tensors = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in packed.layout(recipe.spec, rows, columns).items()
    }
    grid = packed.grid(tensors, recipe.spec, rows, columns)
    return dispatch.select(replace(Problem.of(grid), device=device.type))


def _tokens(source: FloatCheckpoint, config: HfqConfig, own: OwnText | None, head: bool) -> Tokens:
    """Of the data set, or of the text that the model will sample; a few that it is asked where nothing is left over.

    Args:
        head: what stands behind the blocks is calibrated, too.
    """
    chosen: list[int] = []
    others: list[int] = []
    if own is not None:
        chosen = [own.seqlen] * own.count
    elif source.quantizer.calibrated:
        found = calibration_sequences(source.model, config)
        chosen, others = ([len(sequence) for sequence in part] for part in found)
    longest = max(chosen, default=_PROBE)
    at_once = batch_tokens(source.model, source.device, logits=head)
    return Tokens(
        calibration=sum(chosen),
        held_out=sum(others[:HELD_OUT]) or min(_PROBE, longest),
        longest=longest,
        compared=bool(others),
        batch=max(at_once, longest),
    )


# ---- sizes


def _sizes(
    source: FloatCheckpoint,
    config: HfqConfig,
    run: Calibration,
    weights: list[Weight],
    tokens: Tokens,
    own: OwnText | None,
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
    if own is not None:
        text = torch.empty(own.seqlen, dtype=torch.int64, device="meta")
        peak += file_bytes({f"{index:06d}": text for index in range(own.count)})
    return after, peak + _DESCRIBED * (len(source.parameters) + sum(map(len, parts)))


def _stored(weight: Weight, recipe: Recipe) -> int:
    return stored_bytes(recipe.format, recipe.spec, weight.shape)


def _stored_now(source: FloatCheckpoint, weight: Weight) -> Recipe:
    """The recipe that the skeleton was packed with, whatever `target_bits` will choose."""
    known = source.quantizer.selection.recipes
    if weight.name in known:
        return known[weight.name]["weight"]
    module, _, base = weight.name.rpartition(".")
    return known[module][base]
