"""What happens to tensors between a checkpoint and the model: quantization on arrival, names on both sides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

__all__ = ["PackedNames", "QuantizeOnArrival", "parameter_of_each", "spellings"]


class QuantizeOnArrival(ConversionOps):
    """Turns one float tensor, as it arrives from the checkpoint, into its packed Parameters.

    Args:
        quantize: (model, full name of the float parameter, tensor) -> full name -> Parameter.
    """

    def __init__(self, quantize: Callable[[Any, str, Tensor], dict[str, nn.Parameter]]) -> None:
        self.quantize = quantize

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, nn.Parameter]:
        """Called by the loader with full names; values are a tensor or a list with one."""
        arrived: dict[str, nn.Parameter] = {}
        for name, value in input_dict.items():
            arrived |= self.quantize(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return arrived


class PackedNames(WeightRenaming):
    """Renames packed codes between checkpoint (``...weight``) and module (``...qweight``), for some modules only.

    Args:
        modules: names of the modules with packed codes. Keys of a checkpoint may carry or lack the base model's
            prefix, so both spellings belong in.
    """

    __slots__ = ("modules", "source", "target")

    def __init__(
        self, modules: Collection[str], source: str = "weight", target: str = "qweight"
    ) -> None:
        super().__init__(source_patterns=rf"\.{source}$", target_patterns=f".{target}")
        self.modules = frozenset(modules)
        self.source = source
        self.target = target

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name and the pattern that matched, or the old name and None."""
        module, _, tensor = source_key.rpartition(".")
        if tensor != self.source or module not in self.modules:
            return source_key, None
        self._was_used = True
        return f"{module}.{self.target}", self.source_patterns[0]

    def reverse_transform(self) -> PackedNames:
        """The renaming that saving applies."""
        return PackedNames(self.modules, self.target, self.source)


def parameter_of_each(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> the parameter of the float skeleton that it becomes, or becomes a part of.

    By the model's own renaming; names that belong to nothing are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for key in keys:
        renamed, _ = rename_source_key(key, renamings, converters, prefix, expected)
        if renamed not in expected:
            # As in the loader: a key that no rule should have touched may only lack the prefix.
            renamed, _ = rename_source_key(key, [], [], prefix, expected)
        if renamed in expected:
            found[key] = renamed
    return found


def spellings(modules: Iterable[str], prefix: str) -> set[str]:
    """Module names with and without the base model's prefix."""
    dotted = f"{prefix}."
    names = set(modules)
    return (
        names
        | {n.removeprefix(dotted) for n in names}
        | {dotted + n for n in names if not n.startswith(dotted)}
    )
