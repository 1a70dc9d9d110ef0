"""Calibrated methods in ``from_pretrained``: the float model is loaded, then quantized with data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..calibration.report import CalibrationReport, WeightReport
from ..calibration.run import Calibration, Progress, calibrate
from ..calibration.sample import sample_sequences
from ..config import HfqConfig
from ..core.errors import ConfigError
from ..evaluation.logits import position_limit
from ..evaluation.tokenizer import tokenize_with
from ..tokens import choose, sequences
from .bit_allocation import apply_allocation, measure, share_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .transformers import HfqQuantizer

__all__ = ["calibrate_loaded", "calibration_sequences", "progress_bar"]


def calibrate_loaded(model: PreTrainedModel, quantizer: HfqQuantizer) -> CalibrationReport:
    """Replace the modules in ``quantizer.calibrated`` by packed ones, with the data that its config names.

    Raises:
        ConfigError: the data set cannot be used; a module is offloaded; the budget of `target_bits` is too small.
        CalibrationError: as `hfq.calibration.run.calibrate`.
    """
    config, recipes = quantizer.quantization_config, quantizer.calibrated
    for name in recipes:
        if any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            raise ConfigError(
                f"{name} is offloaded, and a calibrated method needs all weights in memory: give a device_map that fits"
            )
    data, _ = calibration_sequences(model, config)
    if config.target_bits is not None:
        run = Calibration(model, recipes, quantizer.make_twin, None)
        groups = measure(run, data, config, lambda index: nullcontext(), {})
        apply_allocation(model, quantizer, share_out(model, quantizer.selection, groups, config))
    with progress_bar(sum(map(len, recipes.values()))) as show:
        return calibrate(model, recipes, data, quantizer.make_twin, show)


@contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """A bar on a terminal: weights that are done, what was found about the last one, time left."""
    with tqdm(total=total, unit="weight", disable=None) as bar:

        def show(report: WeightReport, done: int, _: int) -> None:
            bar.set_description(report.name)
            error = "-" if report.error is None else f"{report.error:.2e}"
            bar.set_postfix(error=error, damping=report.damping, tokens=report.tokens)
            bar.update(done - bar.n)

        yield show


def calibration_sequences(
    model: PreTrainedModel, config: HfqConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """What to calibrate with, and what is left of the data set, in random order.

    Raises:
        ConfigError: the data set cannot be used.
    """
    text = model.config.get_text_config()
    seqlen = min(config.seqlen, position_limit(model) or config.seqlen)
    if config.dataset is None or (isinstance(config.dataset, str) and config.dataset == "self"):
        first = text.bos_token_id
        first = first[0] if isinstance(first, list) else first
        count, seed = config.num_samples, config.seed
        return sample_sequences(model, count, seqlen, seed, first, text.vocab_size), []
    found = sequences(config.dataset, lambda: tokenize_with(config.tokenizer, model), seqlen)
    largest = max(int(torch.max(sequence)) for sequence in found)
    if largest >= text.vocab_size:
        raise ConfigError(
            f"expected token ids below {text.vocab_size}, got {largest}: the dataset's tokens come from another model's "
            "tokenizer"
        )
    return choose(found, config.num_samples, config.seed)
