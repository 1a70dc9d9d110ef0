"""`QuantExperts`: Transformers' fused mixture-of-experts modules with packed stacks of weights.

Transformers keeps all experts of a layer in one module with 3-D parameters and marks its class with
the decorator `use_experts_implementation`, which promises the attributes used here:

    has_gate              ``gate_up_proj`` and ``_apply_gate``, else ``up_proj`` and ``act_fn``
    has_bias              ``gate_up_proj_bias`` [E, N] and ``down_proj_bias`` [E, N]
    is_transposed         stacks are [E, K, N] instead of [E, N, K]
    has_post_expert_norm  ``post_expert_norm`` follows the down projection (not in 5.17)

So no model is named: a module is packed by swapping its class for a subclass of `QuantExperts` and
its own class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import WeightError
from ..core.spec import QuantSpec
from ..kernels.row import each_expert
from .packed import PackedModule
from .parameters import PackedParameters
from .slot import PackedSlot

__all__ = ["QuantExperts", "expert_weights", "is_fused_experts", "pack_experts_", "unpack_experts_"]

# More go through one expert after the other.
_TOKENS_AT_ONCE = 1024

# Instance attributes that the decorator sets in every release from 5.17 to 5.23.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class QuantExperts(PackedModule):
    """Mixin: a fused experts module whose stacks of weights are packed; made by `pack_experts_`.

    A stack that stays in float (left out of the plan) is multiplied as it is. ``torch.compile``
    breaks the graph here (``fullgraph=True`` is refused): which experts run depends on values, and
    counts of tokens per expert would be compiled in.
    """

    float_class: type[nn.Module]
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: float `[T, H]`.
            top_k_index: integer `[T, top_k]`; E and more stand for an expert that is not here.
            top_k_weights: float `[T, top_k]`.

        Returns:
            `[T, H]` in the dtype of hidden_states, summed in float32.
        """
        int8 = self.int8_activations(hidden_states)
        choices = top_k_index.flatten()
        # Experts that are not here stand last.
        positions = choices.argsort(stable=True)
        if unread := self._counts_stay_on_device(hidden_states, len(choices)):
            counts = self._counts(choices)
        else:
            counts = torch.bincount(choices, minlength=self._experts)[: self._experts]
            positions = positions[: int(counts.sum())]
        if not len(positions):
            return torch.zeros_like(hidden_states)
        # Not [] and index_add_: those wake all threads for a single token, which on a busy machine
        # takes milliseconds.
        x = hidden_states.index_select(0, positions // top_k_index.shape[-1])
        at_once = unread or len(x) <= _TOKENS_AT_ONCE
        y = self._run(x, counts, int8) if at_once else self._in_turn(x, counts, int8)
        # Experts that are not here leave zeros.
        chosen = y.new_zeros(top_k_index.numel(), hidden_states.shape[-1])
        chosen = chosen.index_copy(0, positions, y).view(*top_k_index.shape, -1)
        if unread and self._has_norm:  # which may make something else of zeros
            chosen = chosen.where((top_k_index < self._experts).unsqueeze(-1), 0.0)
        weighted = chosen * top_k_weights.unsqueeze(-1)
        dtype = torch.promote_types(weighted.dtype, torch.float32)
        return weighted.sum(1, dtype=dtype).to(hidden_states.dtype)

    def _counts_stay_on_device(self, x: Tensor, tokens: int) -> bool:
        """Whether all kernels read the counts where they are, so that the host need not wait for them."""
        for base in self._bases:
            if base not in self.slots:
                return False
            operands = self.operands(base)
            if not operands.choice.row.reads_counts_on_device(x, tokens, operands.grid):
                return False
        return True

    def _counts(self, choices: Tensor) -> Tensor:
        """How often each expert was chosen, int64 `[E]`; unlike bincount, which looks for the largest value first, nobody waits."""
        # E and more are counted in a place of their own; what is negative is an error, as for bincount.
        owners = choices.long().clamp(max=self._experts)
        counts = owners.new_zeros(self._experts + 1)
        return counts.scatter_add_(0, owners, torch.ones_like(owners))[:-1]

    def _run(self, x: Tensor, counts: Tensor, int8: bool) -> Tensor:
        """What experts make of tokens that are sorted by expert: `[t, H]` -> `[t, H]`, counts int64 `[E]`.

        Tokens behind the sum of counts, which only `_counts_stay_on_device` allows, are zeros before the norm.
        """
        up, down = self._bases
        y = self._products(up, x, counts, int8)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self._products(down, y, counts, int8)
        return self.post_expert_norm(y) if self._has_norm else y

    def _in_turn(self, x: Tensor, counts: Tensor, int8: bool) -> Tensor:
        """The same, one expert after the other: what lies between the projections is much wider than x."""
        done, alone = [], torch.zeros_like(counts)
        for expert, tokens in enumerate(x.split_with_sizes(counts.tolist())):
            if len(tokens):
                alone[expert] = len(tokens)
                done.append(self._run(tokens, alone, int8))
                alone[expert] = 0
        return torch.cat(done)

    @property
    def _bases(self) -> tuple[str, str]:
        """The stacks before and behind the activation function."""
        return "gate_up_proj" if self.has_gate else "up_proj", "down_proj"

    @property
    def _has_norm(self) -> bool:
        return getattr(self, "has_post_expert_norm", False)

    @property
    def _experts(self) -> int:
        """E, as far as it is on this device."""
        return cast(int, next(iter(self.slots.values())).experts)

    def _products(self, base: str, x: Tensor, counts: Tensor, int8: bool) -> Tensor:
        bias = getattr(self, f"{base}_bias") if self.has_bias else None
        if base in self.slots:
            operands = self.operands(base)
            return operands.choice.row.experts(x, counts, operands.grid, bias, int8)
        weights = getattr(self, base)

        def linear(tokens: Tensor, expert: int) -> Tensor:
            weight = weights[expert].T if self.is_transposed else weights[expert]
            return nn.functional.linear(tokens, weight, None if bias is None else bias[expert])

        return each_expert(x, counts, linear)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class exists in this process only; any other one makes it again from the float class.
        return _blank, (self.float_class,), self.__getstate__()

    def extra_repr(self) -> str:
        return "\n".join(
            f"{base}: {slot.float_shape}, format={slot.format}, bits={slot.spec.bits}, "
            f"group_size={slot.spec.group_size}"
            for base, slot in self.slots.items()
        )


def expert_weights(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The float stacks of a fused experts module: name -> `(E, N, K)`; empty for other modules."""
    if isinstance(module, QuantExperts) or not hasattr(type(module), "_apply_gate"):
        return {}
    if not all(isinstance(getattr(module, mark, None), bool) for mark in _MARKS):
        return {}
    found: dict[str, tuple[int, int, int]] = {}
    for base in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = module._parameters.get(base)
        if weight is None or weight.dim() != 3 or not weight.is_floating_point():
            return {}
        experts, rows, columns = weight.shape
        found[base] = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
    return found


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `pack_experts_` takes the module: marked by Transformers' decorator, float stacks."""
    return bool(expert_weights(module))


def pack_experts_(
    module: nn.Module,
    plan: Mapping[str, tuple[str, QuantSpec]],
    dtype: torch.dtype,
    keep_placeholders: bool = False,
) -> QuantExperts:
    """Make a fused experts module hold packed stacks, in place. Their values are still to be set.

    Codes take the name of the stack (``up_proj``), companions append to it (``up_proj_scale``).
    Values come by `PackedModule.set_packed` or `requantize`, `[E, N, K]` for every model.

    Args:
        plan: name of the stack -> (format, spec); stacks that are left out stay in float.
        dtype: dtype of the dequantized weights.
        keep_placeholders: leave a float Parameter on meta, shaped like the checkpoint's, in place
            of the codes, until `set_packed` brings them.

    Returns:
        The module itself.

    Raises:
        WeightError: not a fused experts module, or `plan` names something that it has not.
    """
    shapes = expert_weights(module)
    unknown = sorted(set(plan) - set(shapes))
    if not plan or unknown:
        raise WeightError(
            f"{type(module).__name__}: expected a plan for some of its stacks of experts, "
            f"{', '.join(shapes) or 'of which it has none'}, got {', '.join(unknown) or 'nothing'}"
        )
    floats = {base: cast(nn.Parameter, module._parameters[base]) for base in plan}
    slots = {
        base: _slot(base, *plan[base], shapes[base], bool(module.is_transposed)) for base in plan
    }
    module.__class__ = _quantized_class(type(module))  # type: ignore[arg-type]  # see _blank
    packed = cast(QuantExperts, module)
    packed._init_packed(slots, dtype, next(iter(floats.values())).device)
    # Transformers initialises modules without this mark: it would draw random numbers as codes.
    packed._is_hf_initialized = True
    for base in slots if packed.has_bias else ():
        getattr(packed, f"{base}_bias").requires_grad_(False)
    if keep_placeholders:
        for base, weight in floats.items():
            packed._parameters[base] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
    return packed


def unpack_experts_(module: QuantExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a packed module its own class and float stacks back, in place.

    Args:
        dtype: of the float parameters; that of the virtual weights by default.

    Returns:
        The module itself, trainable, its stacks as its class has them (`[E, K, N]` if transposed).
    """
    module.compute_dtype = dtype or module.compute_dtype
    for base, slot in module.slots.items():
        weight = module.dequantize(base)
        for key in slot.layout():
            del module._parameters[slot.attribute(key)]
        weight = weight.transpose(1, 2).contiguous() if slot.transposed else weight
        module._parameters[base] = nn.Parameter(weight)
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(module.compute_dtype)
        parameter.requires_grad_(True)
    plain: nn.Module = module
    plain.__class__ = module.float_class
    for name in (*PackedParameters.__annotations__, *PackedModule.__annotations__):
        plain.__dict__.pop(name, None)
    return plain


def _slot(
    base: str, format: str, spec: QuantSpec, shape: tuple[int, int, int], transposed: bool
) -> PackedSlot:
    experts, rows, columns = shape
    return PackedSlot(
        base=base,
        format=format,
        spec=spec,
        experts=experts,
        out_features=rows,
        in_features=columns,
        transposed=transposed,
    )


@cache
def _quantized_class(float_class: type[Any]) -> type[QuantExperts]:
    """The subclass of an experts class that packs it."""
    name = f"Quant{float_class.__name__}"
    fields = {
        "__module__": __name__,
        "__doc__": f"{float_class.__name__} with packed stacks.",
        "float_class": float_class,
    }
    return cast(type[QuantExperts], type(name, (QuantExperts, float_class), fields))


def _blank(float_class: type[nn.Module]) -> QuantExperts:
    """A packed module without state, for `copy` and `pickle`."""
    # mypy takes the __hash__ of the instances for that of the class.
    cls = _quantized_class(float_class)  # type: ignore[arg-type]
    return cls.__new__(cls)
