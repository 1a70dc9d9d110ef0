"""`target_bits`: measure what bits cost, share out the budget, keep the outcome as recipes and overrides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..calibration.allocation import Allocation, Group, allocate
from ..calibration.run import Calibration
from ..calibration.sensitivity import Kept, Sensitivity, Visit
from ..config import HfqConfig, Recipe
from ..core.spec import IntSpec
from ..formats import stored_bytes
from ..nn.experts import expert_weights
from ..nn.packed import PackedModule
from .selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .resume import Resume
    from .transformers import HfqQuantizer

__all__ = ["apply_allocation", "float_shape", "measure", "share_out"]


def measure(
    run: Calibration,
    sequences: Sequence[Tensor],
    config: HfqConfig,
    visit: Visit,
    kept: Kept,
    batch_tokens: int,
    resume: Resume | None = None,
) -> list[Group]:
    """The groups of weights whose bits are to be chosen, and what each choice costs; nothing is quantized yet.

    Args:
        batch_tokens: how many run through a block at a time, at least one sequence.
        resume: where costs go as they are found, so that a killed run goes on; None keeps them in memory.

    Raises:
        CalibrationError: activations or gradients are NaN or infinite.
        SaveError: what was found cannot be written.
    """
    count = len(run.blocks)
    found = [] if resume is None else [_group(report) for report in resume.reports]
    done = 0 if resume is None else resume.done
    if done == count:
        return found
    assert config.candidate_bits is not None
    sensitivity = Sensitivity(
        run,
        sequences,
        config.candidate_bits,
        lambda name: not config.fixes_bits(name),
        visit,
        kept,
        batch_tokens,
    )
    if done and resume is not None:
        sensitivity.restore(resume.streams())
    else:
        sensitivity.gradients(config.seed)
    disable = None if run.ranks.first else True
    with tqdm(total=count, initial=done, unit="block", desc="sensitivity", disable=disable) as bar:
        for index in range(done, count):
            found += sensitivity.block(index)
            if resume is not None:
                resume.finish(index, {}, sensitivity.hidden(), [_written(g) for g in found])
            bar.update()
    return found


def share_out(
    model: nn.Module, selection: Selection, groups: Sequence[Group], config: HfqConfig
) -> Allocation:
    """The bits of each group with the least predicted loss within the budget of all quantized weights.

    Raises:
        ConfigError: the budget is too small.
    """
    assert config.target_bits is not None
    free = {name for group in groups for name in group.names}
    weights = sum(group.weights for group in groups)
    fixed_weights = fixed_bytes = 0
    for name, shape, recipe in _quantized(model, selection):
        if name not in free:
            fixed_weights += math.prod(shape)
            fixed_bytes += stored_bytes(recipe.format, recipe.spec, shape)
    total = weights + fixed_weights
    bits = allocate(groups, math.floor(config.target_bits * total / 8) - fixed_bytes)
    spent = sum(group.bytes[chosen] for group, chosen in zip(groups, bits, strict=True))
    return Allocation(
        target_bits=config.target_bits,
        bits_per_weight=8 * (spent + fixed_bytes) / max(total, 1),
        groups=tuple(groups),
        bits=tuple(bits),
        fixed_weights=fixed_weights,
    )


def apply_allocation(
    model: PreTrainedModel, quantizer: HfqQuantizer, allocation: Allocation
) -> None:
    """Recipes get the bits, and a config with the overrides that say so takes the place of the one with a target."""
    bits = allocation.by_name
    for module, recipes in quantizer.selection.recipes.items():
        for base, recipe in recipes.items():
            chosen = bits.get(_full_name(module, base))
            if chosen is not None:
                assert isinstance(recipe.spec, IntSpec)
                # In place: what is quantized with data is another view of the same recipes.
                recipes[base] = replace(recipe, spec=replace(recipe.spec, bits=chosen))
    config = quantizer.quantization_config.with_bits(bits)
    quantizer.allocation = allocation
    quantizer.quantization_config = model.config.quantization_config = config


def float_shape(module: nn.Module, base: str) -> tuple[int, ...]:
    """`(N, K)` or `(E, N, K)` of a weight, packed already or not."""
    if isinstance(module, PackedModule):
        return module.slots[base].float_shape
    if base != "weight":
        return expert_weights(module)[base]
    shape = tuple(module.get_parameter(base).shape)
    return shape[::-1] if type(module).__name__ == "Conv1D" else shape


def _quantized(
    model: nn.Module, selection: Selection
) -> Iterator[tuple[str, tuple[int, ...], Recipe]]:
    """Every weight that is or will be packed; of tied ones the first."""
    seen: set[int] = set()
    for name, recipes in selection.recipes.items():
        module = model.get_submodule(name)
        for base, recipe in recipes.items():
            if isinstance(module, PackedModule):
                tensor = module.packed_parameters(base)["weight"]
            else:
                tensor = module.get_parameter(base)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _full_name(name, base), float_shape(module, base), recipe


def _full_name(module: str, base: str) -> str:
    return module if base == "weight" else f"{module}.{base}"


def _written(group: Group) -> dict[str, object]:
    return {
        "names": group.names,
        "weights": group.weights,
        "bytes": list(group.bytes.items()),
        "costs": list(group.costs.items()),
    }


def _group(written: dict[str, object]) -> Group:
    names, weights = written["names"], written["weights"]
    assert isinstance(names, (list, tuple)) and isinstance(weights, int)
    return Group(
        names=tuple(names),
        weights=weights,
        bytes=dict(written["bytes"]),  # type: ignore[call-overload]
        costs=dict(written["costs"]),  # type: ignore[call-overload]
    )
