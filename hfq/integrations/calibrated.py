"""Calibrated methods in ``from_pretrained``: the float model is loaded, then quantized with data."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.blocks import find_blocks
from ..calibration.report import CalibrationReport
from ..calibration.run import Calibration, calibrate, weight_names
from ..calibration.sample import TOGETHER, sample_sequences
from ..config import HfqConfig
from ..core.errors import ConfigError
from ..evaluation.logits import input_device, position_limit
from ..evaluation.tokenizer import tokenize_with
from ..tokens import choose, sequences
from .batching import batch_tokens
from .bit_allocation import apply_allocation, measure, share_out
from .live import live_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .transformers import HfqQuantizer

__all__ = [
    "HELD_OUT",
    "calibrate_loaded",
    "calibration_sequences",
    "of_its_own",
    "sample",
]

# Sequences of the data set, beside those calibrated with, that the quantized model is compared with the float one on.
HELD_OUT = 8


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
    inside = tuple(f"{name}." for name in find_blocks(model))
    tokens = batch_tokens(
        model, input_device(model), logits=not all(name.startswith(inside) for name in recipes)
    )
    if config.target_bits is not None:
        run = Calibration(model, recipes, quantizer.make_twin, None)
        groups = measure(run, data, config, lambda index: nullcontext(), {}, tokens)
        apply_allocation(model, quantizer, share_out(model, quantizer.selection, groups, config))
    with live_table(weight_names(recipes)) as show:
        return calibrate(model, recipes, data, quantizer.make_twin, show, tokens)


def calibration_sequences(
    model: PreTrainedModel, config: HfqConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """What to calibrate with, and what is left of the data set, in random order.

    Raises:
        ConfigError: the data set cannot be used.
    """
    text = model.config.get_text_config()
    seqlen = min(config.seqlen, position_limit(model) or config.seqlen)
    if of_its_own(config):
        return sample(model, config, seqlen, TOGETHER), []
    found = sequences(
        config.dataset,
        lambda: tokenize_with(config.tokenizer, model),
        seqlen,
        enough=config.num_samples + HELD_OUT,
    )
    largest = max(int(torch.max(sequence)) for sequence in found)
    if largest >= text.vocab_size:
        raise ConfigError(
            f"expected token ids below {text.vocab_size}, got {largest}: the dataset's tokens come from another model's "
            "tokenizer"
        )
    return choose(found, config.num_samples, config.seed)


def of_its_own(config: HfqConfig) -> bool:
    """Whether the model samples its own calibration text."""
    return config.dataset is None or (isinstance(config.dataset, str) and config.dataset == "self")


def sample(model: PreTrainedModel, config: HfqConfig, seqlen: int, together: int) -> list[Tensor]:
    """Sequences of the model's own, int64 `[seqlen]`.

    Args:
        model: the float model.
        together: sequences that are sampled side by side.
    """
    text = model.config.get_text_config()
    first = text.bos_token_id
    first = first[0] if isinstance(first, list) else first
    count, seed = config.num_samples, config.seed
    return sample_sequences(model, count, seqlen, seed, first, text.vocab_size, together)
