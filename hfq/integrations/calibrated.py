"""Calibrated methods in ``from_pretrained``: the float model is loaded, then quantized with data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..calibration.report import CalibrationReport, WeightReport
from ..calibration.run import calibrate
from ..calibration.sample import sample_sequences
from ..config import HfqConfig, Recipe
from ..core.errors import ConfigError
from ..evaluation.logits import position_limit
from ..evaluation.tokenizer import tokenize_with
from ..nn.packed import PackedModule
from ..tokens import sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["calibrate_loaded"]


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
    data = _data(model, config)
    with tqdm(total=sum(map(len, recipes.values())), unit="weight", disable=None) as bar:

        def show(report: WeightReport, done: int, total: int) -> None:
            bar.set_description(report.name)
            error = "-" if report.error is None else f"{report.error:.2e}"
            bar.set_postfix(error=error, damping=report.damping, tokens=report.tokens)
            bar.update(done - bar.n)

        return calibrate(model, recipes, data, make_twin, show)


def _data(model: PreTrainedModel, config: HfqConfig) -> list[Tensor]:
    seqlen = min(config.seqlen, position_limit(model) or config.seqlen)
    if config.dataset is None or (isinstance(config.dataset, str) and config.dataset == "self"):
        text = model.config.get_text_config()
        first = text.bos_token_id
        return sample_sequences(
            model,
            config.num_samples,
            seqlen,
            config.seed,
            first[0] if isinstance(first, list) else first,
            text.vocab_size,
        )
    found = sequences(
        config.dataset,
        lambda: tokenize_with(config.tokenizer, model),
        config.num_samples,
        seqlen,
        config.seed,
    )
    vocabulary = model.config.get_text_config().vocab_size
    largest = max(int(torch.max(sequence)) for sequence in found)
    if largest >= vocabulary:
        raise ConfigError(
            f"expected token ids below {vocabulary}, got {largest}: the dataset's tokens come from another model's "
            "tokenizer"
        )
    return found
