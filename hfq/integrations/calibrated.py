"""Calibrated methods in ``from_pretrained``: the float model is loaded, then quantized with data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..calibration.blocks import find_blocks
from ..calibration.report import CalibrationReport
from ..calibration.run import calibrate, weight_names
from ..calibration.sample import TOGETHER, sample_sequences
from ..config import HfqConfig, Recipe
from ..core.errors import ConfigError
from ..evaluation.logits import input_device, position_limit
from ..evaluation.tokenizer import tokenize_with
from ..nn.packed import PackedModule
from ..tokens import choose, sequences
from .batching import batch_tokens
from .live import live_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "HELD_OUT",
    "calibrate_loaded",
    "calibration_sequences",
    "of_its_own",
    "sample",
]

# Sequences of the data set, beside those calibrated with, that the quantized model is compared with the float one on.
HELD_OUT = 8


def calibrate_loaded(
    model: PreTrainedModel,
    config: HfqConfig,
    recipes: Mapping[str, Mapping[str, Recipe]],
    make_twin: Callable[[nn.Module, Recipe], PackedModule],
) -> CalibrationReport:
    """Replace the modules named in `recipes` by packed ones, with the data that `config` names.

    Raises:
        ConfigError: the data set cannot be used; a module is offloaded.
        CalibrationError: as `hfq.calibration.run.calibrate`.
    """
    for name in recipes:
        if any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            raise ConfigError(
                f"{name} is offloaded, and a calibrated method needs all weights in memory: give a device_map that fits"
            )
    data, _ = calibration_sequences(model, config)
    with live_table(weight_names(recipes)) as show:
        inside = tuple(find_blocks(model))
        tokens = batch_tokens(
            model, input_device(model), logits=not all(name.startswith(inside) for name in recipes)
        )
        return calibrate(model, recipes, data, make_twin, show, tokens)


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
