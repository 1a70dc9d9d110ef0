"""What stands in the way of a run of `hfq.quantize`, or will surprise: in the files, the settings, the machine."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..diagnose.machine import memory
from ..table import format_bytes, without_numbers
from .checkpoint import read_headers
from .forecast import Forecast, Tokens, Weight
from .own_text import OwnText
from .source import FloatCheckpoint

__all__ = ["check_floats", "data_problems", "resource_problems", "shape_problems"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floats(source: FloatCheckpoint) -> None:
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


def data_problems(tokens: Tokens, own: OwnText | None) -> Iterator[str]:
    """Args:
    own: text that the model is to sample; None where a data set is given, or none is needed.
    """
    if own is not None and own.streamed:
        yield (
            f"no dataset is given (dataset=..., --dataset), and the float model does not fit into the free memory: it is "
            f"read {own.passes} times from disk to sample {own.count} sequences of {own.seqlen} tokens from it. Real text "
            "calibrates better and costs nothing"
        )
    elif own is not None:
        yield (
            "no dataset is given (dataset=..., --dataset): the model samples its own calibration text, of which nothing "
            "is held out to compare the models on. Real text calibrates better"
        )
    elif tokens.calibration and not tokens.compared:
        yield "all of the data set is calibrated with: nothing is left to compare the models on; give more or lower num_samples"


def shape_problems(weights: list[Weight]) -> Iterator[str]:
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


def resource_problems(
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
