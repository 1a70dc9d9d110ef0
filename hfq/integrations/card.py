"""The model card: metadata that the Hub reads; for people what was done and how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from .._version import __version__
from ..config import HfqConfig
from ..core.errors import ConfigError
from .inventory import bits, module_table, sizes
from .origin import Origin, origin_of
from .staging import staged

__all__ = [
    "CARD",
    "has_foreign_card",
    "is_ours",
    "model_card",
    "renamed",
    "template_folder",
    "write_card",
]

CARD = "README.md"

_MARK = (
    "<!-- hfq wrote this card and renews it with each save; "
    "remove this line to keep your own edits -->"
)
_TEMPLATE = "quantized.md.jinja"


def is_ours(text: str) -> bool:
    """Whether hfq may replace a card: it wrote it, and nobody removed the line that says so."""
    return _MARK in text


def has_foreign_card(folder: Path) -> bool:
    """Whether the folder has a card that somebody else wrote or edited for good."""
    path = folder / CARD
    return path.is_file() and not is_ours(path.read_text(encoding="utf-8", errors="replace"))


def write_card(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    results: Mapping[str, float] | None = None,
    dataset: str | None = None,
    command: str | None = None,
) -> bool:
    """Write the card into the folder of a saved model; False where somebody's own card stays.

    Args, Raises: see `model_card`; also SaveError.
    """
    target = Path(folder)
    if has_foreign_card(target):
        return False
    name = target.absolute().name
    card = model_card(model, name=name, results=results, dataset=dataset, command=command)
    with staged(target) as new:
        (new / CARD).write_text(str(card), encoding="utf-8")
    return True


def renamed(text: str, repo_id: str) -> str:
    """A card of ours with the name of its repository in place of its folder's."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    if found is None:
        return text
    old, new = found[1], repo_id.rpartition("/")[2]
    text = text.replace(found[0], f"# {new}", 1).replace(
        f'from_pretrained("{old}"', f'from_pretrained("{repo_id}"'
    )
    card = ModelCard(text)
    if card.data.get("model_name") == old:
        card.data["model_name"] = new
    return str(card)


def model_card(
    model: PreTrainedModel,
    *,
    name: str,
    results: Mapping[str, float] | None = None,
    dataset: str | None = None,
    command: str | None = None,
) -> ModelCard:
    """The card of a quantized model. Equal arguments give an equal text; the network is not used.

    Args:
        model: quantized by hfq; its weights may be on meta.
        name: title, and what ``from_pretrained`` takes in the example.
        results: metric name -> measured value, all finite.
        dataset: name of the text that `results` were measured on.
        command: the command line that made the model.

    Raises:
        ConfigError: a result is NaN or infinite.
    """
    config, origin, measured = _config(model), origin_of(model), _checked(results)
    text = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            mark=_MARK,
            metadata=_metadata(model, config, origin, name, measured, dataset).to_yaml(),
            name=name,
            origin=origin,
            architecture=type(model).__name__,
            auto_class=_auto_class(model),
            bits=bits(model),
            config=config,
            settings=_settings(config),
            size=sizes(model),
            modules=module_table(model),
            results={metric: f"{value:.4g}" for metric, value in measured.items()},
            dataset=dataset,
            command=command,
            versions={
                "hfq": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        )
    )
    return ModelCard(text)


def template_folder(package: Path) -> Path:
    """Where the templates are: inside of the package when it is installed, beside it in a clone."""
    places = (package / "model_cards", package.parent / "model_cards")
    for place in places:
        if (place / _TEMPLATE).is_file():
            return place
    raise FileNotFoundError(
        f"expected {_TEMPLATE} in {places[0]} or {places[1]}; install hfq again"
    )


def _environment() -> jinja2.Environment:
    # The text is Markdown: HTML escapes would show. A name that the template misspells is an error.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder(Path(__file__).parents[1])),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["cell"] = _cell
    return environment


def _cell(value: object) -> str:
    """Text for a cell of a Markdown table, where a bar would start the next cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _metadata(
    model: PreTrainedModel,
    config: HfqConfig,
    origin: Origin,
    name: str,
    results: Mapping[str, float],
    dataset: str | None,
) -> ModelCardData:
    task = origin.metadata.get("pipeline_tag") or _task(model)
    own: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["hfq", config.method, f"{config.bits}-bit", *(model.model_tags or ())],
    }
    if origin.base_model:
        own |= {"base_model": origin.base_model, "base_model_relation": "quantized"}
    if origin.revision:
        own["base_model_revision"] = origin.revision
    if results:
        own |= {"model_name": name, "eval_results": _eval_results(results, task, dataset)}
    return ModelCardData(**{**origin.metadata, **own})


def _eval_results(
    results: Mapping[str, float], task: str | None, dataset: str | None
) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type=dataset or "unknown",
            dataset_name=dataset or "unknown",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in results.items()
    ]


def _checked(results: Mapping[str, float] | None) -> dict[str, float]:
    for metric, value in (results or {}).items():
        if not math.isfinite(value):
            raise ConfigError(
                f"result {metric!r} is {value}: a card shows measured, finite values only"
            )
    return dict(results or {})


def _config(model: PreTrainedModel) -> HfqConfig:
    config = model.config.quantization_config
    return config if isinstance(config, HfqConfig) else HfqConfig(**config)


def _settings(config: HfqConfig) -> dict[str, Any]:
    """What was chosen, without what is not set and what the table of modules shows."""
    written = {key: value for key, value in config.to_dict().items() if value is not None}
    for key in (
        "quant_method",
        "hfq_version",
        "format_version",
        "overrides",
        "modules_to_not_convert",
    ):
        written.pop(key, None)
    return written


def _task(model: PreTrainedModel) -> str | None:
    """The Hub's name of what the model's class is for."""
    for task, classes in cast(Mapping[str, Mapping[str, Any]], TASK_MAPPING).items():
        for known in classes.values():
            if type(model).__name__ in (known if isinstance(known, tuple) else (known,)):
                return task
    return None


def _auto_class(model: PreTrainedModel) -> str:
    return {
        "text-generation": "AutoModelForCausalLM",
        "image-text-to-text": "AutoModelForImageTextToText",
    }.get(_task(model) or "", type(model).__name__)
