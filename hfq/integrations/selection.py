"""Which weights of a model are packed, and why the others are not. No model is named here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import HfqConfig, Recipe
from ..core.errors import ConfigError
from ..core.spec import Fp8Spec, with_float_activations
from ..nn.experts import is_fused_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Selection", "select_modules"]


@dataclass
class Selection:
    """The outcome for every module with a weight matrix.

    Attributes:
        recipes: module name -> float parameter name -> recipe.
        kept: name -> why it stays in float.
    """

    recipes: dict[str, dict[str, Recipe]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line, such as ``quantized 28 of 30 weights; kept 2: output head (1), input embedding (1)``."""
        packed = sum(len(bases) for bases in self.recipes.values())
        line = f"quantized {packed} of {packed + len(self.kept)} weights"
        if self.kept:
            reasons = ", ".join(
                f"{why} ({count})" for why, count in Counter(self.kept.values()).most_common()
            )
            line += f"; kept {len(self.kept)}: {reasons}"
        return line


def select_modules(
    model: PreTrainedModel,
    config: HfqConfig,
    available: Collection[str] | None = None,
    packed: Collection[str] | None = None,
) -> Selection:
    """Decide for every Linear, Conv1D, Embedding and fused-experts weight of a float skeleton.

    Args:
        available: names of the parameters that the checkpoint has; None if they are not known.
        packed: those that are packed already: then the checkpoint decides, not the rules.

    Raises:
        ConfigError: the settings contradict the model's tied weights.
    """
    roles = _Roles.of(model)
    selection = Selection()
    for name, module in model.named_modules():
        for base in _weights(module):
            full_name = name if base == "weight" else f"{name}.{base}"
            # Tied modules share one weight, so they share its owner's recipe.
            owner = roles.tied.get(full_name, full_name)
            names = {f"{owner}.{base}", f"{name}.{base}"}
            reason = _reason_to_keep(name, module, config, roles)
            if available is not None and names.isdisjoint(available):
                reason = "not in the checkpoint"
            elif packed is not None:
                reason = (
                    (reason or _stored_float(config, owner)) if names.isdisjoint(packed) else None
                )
            recipe = None if reason else _without_data(config.recipe(owner), name, roles, module)
            if recipe is None:
                selection.kept[full_name] = reason or "overrides"
            else:
                selection.recipes.setdefault(name, {})[base] = recipe
    return selection


@dataclass(frozen=True)
class _Roles:
    """What modules are to the model as a whole.

    Attributes:
        inputs, outputs: names of the input embedding and of the output head.
        tied: name of a module -> name of the module whose weight it shares.
        float32: parts of names that the model keeps in float32.
    """

    inputs: frozenset[str]
    outputs: frozenset[str]
    tied: Mapping[str, str]
    float32: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Roles:
        heads = {
            "inputs": model.get_input_embeddings(),
            "outputs": model.get_output_embeddings(),  # type: ignore[no-untyped-call]
        }
        names = {
            role: frozenset(n for n, m in model.named_modules() if m is module)
            for role, module in heads.items()
        }
        tied = {
            target.rpartition(".")[0]: source.rpartition(".")[0]
            for target, source in model.all_tied_weights_keys.items()
            if target.endswith(".weight") and source.endswith(".weight")
        }
        keep = {
            *(model._keep_in_fp32_modules or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        }
        return cls(names["inputs"], names["outputs"], tied, frozenset(keep))


def _weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the float parameters of `module` that could be packed; empty ones hold nothing to pack."""
    if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        return ("weight",) if module.weight.numel() else ()
    if is_fused_experts(module):
        return tuple(
            n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.numel()
        )
    return ()


def _without_data(
    recipe: Recipe | None, name: str, roles: _Roles, module: nn.Module
) -> Recipe | None:
    """Tables are looked up and not multiplied: nothing is read to calibrate with, so the best grid has to do.

    There are no activations to quantize either; a tied head keeps them in float, because it shares the table.
    """
    table = isinstance(module, nn.Embedding) or name in roles.tied or name in roles.tied.values()
    if recipe is None or not table:
        return recipe
    recipe = replace(recipe, spec=with_float_activations(recipe.spec))
    if not recipe.calibrated:
        return recipe
    searched = not isinstance(recipe.spec, Fp8Spec)  # floats have one grid
    return replace(recipe, method="rtn", options={"scale_search": searched})


def _stored_float(config: HfqConfig, owner: str) -> str:
    return "overrides" if config.recipe(owner) is None else "stored in float"


def _reason_to_keep(name: str, module: nn.Module, config: HfqConfig, roles: _Roles) -> str | None:
    """Why the weight stays in float whatever its recipe; None if it may be packed."""
    if config.skips(name):
        return "modules_to_not_convert"
    known = (nn.Linear, Conv1D, nn.Embedding)
    if isinstance(module, known) and type(module) not in known:
        return f"{type(module).__name__} has code of its own"
    if any(part in roles.float32 for part in name.split(".")):
        return "the model keeps it in float32"
    return _reason_by_role(name, module, config, roles)


def _reason_by_role(name: str, module: nn.Module, config: HfqConfig, roles: _Roles) -> str | None:
    """Embeddings and heads are packed on request only, tied ones together."""
    owner = roles.tied.get(name, name)
    if owner != name or name in roles.tied.values():
        return _reason_if_tied(name, owner, config, roles)
    if config.overridden(name):
        return None
    if name in roles.outputs:
        return None if config.quantize_lm_head else "output head"
    if name in roles.inputs:
        return None if config.quantize_embeddings else "input embedding"
    return "embedding that is not the input's" if isinstance(module, nn.Embedding) else None


def _reason_if_tied(name: str, owner: str, config: HfqConfig, roles: _Roles) -> str | None:
    if name in roles.outputs and config.quantize_lm_head and not config.quantize_embeddings:
        raise ConfigError(
            f"quantize_lm_head=True, but the head {name!r} shares its weight with {owner!r}: "
            "set quantize_embeddings=True to pack both"
        )
    if owner in roles.inputs and (config.quantize_embeddings or config.overridden(owner)):
        return None
    return f"tied to {owner}" if owner != name else "tied to the output head"
