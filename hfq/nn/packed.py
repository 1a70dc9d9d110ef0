"""What every module with packed weights shares: its parameters, its kernel layout, moving, saving, loading.

The packed tensors are Parameters without gradient, so that offloading, tying and sharding treat them like any
weight. Scales and zero points are held as the integers of the same bits (float16 as int16): a cast of the whole
model, an upcast before training or a question for the model's dtype must not reach them. State dicts and
checkpoints have them as floats.

They rest in the neutral layout of their format until `prepare` turns them into the layout of the kernel that was
chosen for their device; the same Parameters hold either, so there is one copy in memory. Everything that leaves
the module (state dict, copies, `.to`) sees the neutral layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core import affine
from ..core.bits import packed_bytes
from ..core.errors import WeightError
from ..core.weight import PackedGrid, QuantizedWeight
from ..formats import FORMATS, TensorLayout, check_tensors
from ..kernels import dispatch
from .packing import Encode, pack_weight
from .slot import PackedSlot
from .virtual_weight import VirtualWeight

__all__ = ["KERNEL_MODES", "PackedModule"]

# How a kernel may treat activations of few tokens:
#   exact  in float32
#   int8   quantized to 8 bits per token and block of columns, where the kernel can (integer dot products)
#   auto   exact for float32 inputs and where gradients flow, int8 for 16-bit inputs, whose own rounding is
#          of the same size
KERNEL_MODES = ("auto", "exact", "int8")

# Keys of a format's tensors that kernels read directly, and the field of PackedGrid that holds them.
_OPERANDS = {"weight": "qweight", "weight_scale": "scales", "weight_zero": "zeros"}

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class PackedModule(nn.Module):
    """Mixin: a module with one or more packed weights.

    Attributes:
        slots: the packed weights by the name of the float parameter they replace.
        kernel_mode: one of `KERNEL_MODES`.
        compute_dtype: dtype of the virtual float weight; follows ``.to(dtype)``.
    """

    slots: dict[str, PackedSlot]
    kernel_mode: str
    compute_dtype: torch.dtype
    _choices: dict[str, dispatch.Choice]
    _runtime: dict[str, PackedGrid]
    # The module whose tensors this one uses (tied weights), in a tuple so that it is no submodule.
    _owner: tuple[PackedModule, ...] = ()

    def _init_packed(self, slots: Mapping[str, PackedSlot], dtype: torch.dtype, device: Any) -> None:
        """Register the packed parameters, uninitialised, in the neutral layout."""
        self.slots = dict(slots)
        self.kernel_mode = "auto"
        self.compute_dtype = dtype
        self._choices = {}
        self._runtime = {}
        for slot in self.slots.values():
            for key, entry in slot.layout().items():
                empty = torch.empty(entry.shape, dtype=entry.dtype, device=device)
                # On meta the floats stay floats: a loader compares and casts by the dtype of the checkpoint.
                self._parameters[slot.attribute(key)] = _frozen(empty if empty.is_meta else _as_bits(empty))

    # ---- the packed tensors

    def packed_parameters(self, base: str) -> dict[str, nn.Parameter]:
        """The Parameters of one slot by key, in whatever layout they are now, floats as bits."""
        slot, placeholder = self.slots[base], self.placeholder(base)
        found = {key: self._parameters.get(slot.attribute(key)) for key in slot.layout()}
        return {key: p for key, p in found.items() if p is not None and p is not placeholder}

    def placeholder(self, base: str) -> nn.Parameter | None:
        """The float parameter on meta that keeps a checkpoint tensor's name until it is quantized on the fly.

        In a stack of experts the codes go by the same name; they have one dimension more.
        """
        held = self._parameters.get(base)
        return held if held is not None and held.dim() == len(self.slots[base].float_shape) else None

    def neutral_tensors(self, base: str) -> dict[str, Tensor]:
        """The tensors of one slot as a checkpoint stores them; copies where the kernel layout differs."""
        slot, layout = self.slots[base], self.slots[base].layout()
        return {
            key: _as_float(self._restored(slot, parameter.data, layout[key]), layout[key].dtype)
            for key, parameter in self.packed_parameters(base).items()
        }

    def check_packed(self, name: str) -> None:
        """Compare all packed tensors with their layouts; `CheckpointError` naming the module where they differ."""
        for base in self.slots:
            check_tensors(name, self.neutral_tensors(base), self.slots[base].layout())

    @torch.no_grad()
    def set_packed(self, base: str, tensors: Mapping[str, Tensor]) -> None:
        """Put neutral tensors in place. Tensors saved for a pending backward stay valid: storage is replaced."""
        if self._owner:
            return self._owner[0].set_packed(base, tensors)
        self._runtime.pop(base, None)
        slot = self.slots[base]
        for key, tensor in tensors.items():
            name = slot.attribute(key)
            parameter = self._parameters[name]
            if parameter is None or parameter.is_meta or parameter.device != tensor.device:
                self._parameters[name] = _frozen(_as_bits(tensor))
            else:
                parameter.data = _as_bits(tensor)

    def requantize(self, base: str, weight: Tensor, encode: Encode | None = None) -> None:
        """Quantize a float weight into the slot, by rounding to nearest unless `encode` says otherwise.

        The module is unchanged if that fails.
        """
        spec = self.slots[base].spec

        def round_to_nearest(rows: Tensor) -> QuantizedWeight:
            return affine.encode(rows, *affine.range_grid(rows, spec), spec)

        self.set_packed(base, pack_weight(weight, self.slots[base], encode or round_to_nearest))

    # ---- the float weight

    def dequantize(self, base: str = "weight") -> Tensor:
        """The weight behind the codes, detached, in `compute_dtype`: `[N, K]` or `[E, N, K]`."""
        slot = self.slots[base]
        with torch.no_grad():
            if slot.experts is None:
                return self.kernel(base).dequantize(self.grid(base), self.compute_dtype)
            grid, row = self.grid(base), self.kernel(base)
            stack = torch.empty(slot.float_shape, dtype=self.compute_dtype, device=grid.qweight.device)
            for index in range(slot.experts):
                stack[index] = row.dequantize(grid.expert(index), self.compute_dtype)
            return stack

    def _virtual_weight(self) -> VirtualWeight:
        """What `module.weight` is for a module with the one slot "weight"."""
        slot = self.slots["weight"]
        device = self.packed_parameters("weight")["weight"].device
        description = f"{slot.format} {slot.spec.bits} bits"
        return VirtualWeight(
            slot.float_shape, self.compute_dtype, device, self.dequantize, self._set_weight, description
        )

    def _set_weight(self, weight: Tensor) -> None:
        device = self.packed_parameters("weight")["weight"].device
        self.requantize("weight", weight.detach().to(device))

    # ---- kernel layout

    @property
    def is_offloaded(self) -> bool:
        """Weights that a hook fetches for each call are used as they are stored."""
        hook = getattr(self, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(one, "offload", False) for one in hooks):
            return True
        return any(p.is_meta for base in self.slots for p in self.packed_parameters(base).values())

    def prepare(self) -> None:
        """Choose a kernel for each slot and bring its tensors into that kernel's layout, in place."""
        if self._owner:
            return self._owner[0].prepare()
        if self.is_offloaded:
            return
        for base in self.slots:
            if base not in self._runtime:
                self._choices[base] = self._choose(base)
                self._runtime[base] = self._prepared_grid(base)

    def restore(self) -> None:
        """Bring all tensors back into the neutral layout, in place."""
        if self._owner:
            return self._owner[0].restore()
        for base, slot in self.slots.items():
            layout = slot.layout()
            for key, parameter in self.packed_parameters(base).items():
                parameter.data = self._restored(slot, parameter.data, layout[key])
        self._runtime.clear()

    def grid(self, base: str) -> PackedGrid:
        """Operands of the slot's kernel: prepared ones, or neutral ones for an offloaded module."""
        if self._owner:
            return self._owner[0].grid(base)
        if base not in self._runtime:
            self.prepare()
        return self._runtime[base] if base in self._runtime else self._neutral_grid(base)

    def kernel(self, base: str) -> dispatch.KernelRow:
        """The kernel that reads `grid(base)`."""
        if self._owner:
            return self._owner[0].kernel(base)
        if base not in self._runtime:
            self.prepare()
        if base in self._runtime:
            return self._choices[base].row
        return dispatch.rows()[-1]

    def kernel_choice(self, base: str) -> dispatch.Choice:
        """The kernel of a slot and why others were refused."""
        if self._owner:
            return self._owner[0].kernel_choice(base)
        if base not in self._runtime:
            self.prepare()
        if base in self._runtime:
            return self._choices[base]
        reason = "the weights are offloaded and fetched for each call"
        return dispatch.Choice(dispatch.rows()[-1], tuple((row.name, reason) for row in dispatch.rows()[:-1]))

    def int8_activations(self, x: Tensor) -> bool:
        """Whether a kernel may quantize the activations x; see `KERNEL_MODES`."""
        if self.kernel_mode == "auto":
            return x.dtype != torch.float32 and not (x.requires_grad and torch.is_grad_enabled())
        return self.kernel_mode == "int8"

    def share_packed(self, other: PackedModule, base: str = "weight") -> None:
        """Use the very tensors of another module's slot, in that module's kernel layout (tied weights)."""
        for key, parameter in other.packed_parameters(base).items():
            self._parameters[self.slots[base].attribute(key)] = parameter
        self._owner = (other,)

    def _choose(self, base: str) -> dispatch.Choice:
        grid = self._neutral_grid(base)
        return dispatch.select(dispatch.Problem.of(grid))

    def _neutral_grid(self, base: str) -> PackedGrid:
        slot, layout = self.slots[base], self.slots[base].layout()
        tensors = {
            key: _as_float(parameter.data, layout[key].dtype)
            for key, parameter in self.packed_parameters(base).items()
        }
        return FORMATS.get(slot.format).grid(tensors, slot.spec, slot.out_features, slot.in_features)

    def _prepared_grid(self, base: str) -> PackedGrid:
        """The slot's operands in the layout of its kernel; its Parameters now hold that layout."""
        slot, row = self.slots[base], self._choices[base].row
        parameters = self.packed_parameters(base)
        grid = self._neutral_grid(base)
        prepared: dict[str, Tensor] = {}
        for key, field in _OPERANDS.items():
            operand = getattr(grid, field)
            if operand is None:
                continue
            neutral_dims = slot.stack_dims + (3 if key == "weight" else 2)
            prepared[field] = operand if operand.dim() > neutral_dims else row.prepare(operand)
            # Decoded operands (double-quantized scales) are extra; all others live in their Parameter.
            if operand.data_ptr() == parameters[key].data_ptr():
                parameters[key].data = _as_bits(prepared[field])
        return replace(grid, **prepared)

    def _restored(self, slot: PackedSlot, tensor: Tensor, entry: TensorLayout) -> Tensor:
        """One Parameter's tensor in the neutral layout."""
        if tensor.dim() == len(entry.shape):
            return tensor
        row_bytes = packed_bytes(slot.in_features, slot.spec.bits)
        holder = self._owner[0] if self._owner else self
        return holder._choices[slot.base].row.restore(tensor, slot.out_features, row_bytes)

    # ---- torch.nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "weight" in self.__dict__.get("slots", ()):
            if isinstance(value, VirtualWeight):
                value = value.materialize()
            if not isinstance(value, Tensor):
                raise WeightError(f"expected a float tensor for a packed weight, got {type(value).__name__}")
            return self._set_weight(value)
        if isinstance(value, nn.Parameter):
            for base, slot in self.__dict__.get("slots", {}).items():
                if any(name == slot.attribute(key) for key in slot.layout()):
                    self._runtime.pop(base, None)
                    if value.is_floating_point() and not value.is_meta:
                        value = _frozen(_as_bits(value.data), like=value)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the neutral layout: the reader may have other kernels."""
        self.restore()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move packed tensors; casts do not reach them, `compute_dtype` follows instead."""
        was_prepared = bool(self._runtime) or any(owner._runtime for owner in self._owner)
        self.restore()
        device = next(iter(self.packed_parameters(next(iter(self.slots))).values())).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        super()._apply(fn, recurse)
        if was_prepared:
            self.prepare()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for base, slot in self.slots.items():
            for key, tensor in self.neutral_tensors(base).items():
                destination[prefix + slot.attribute(key)] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.restore()
        for base, slot in self.slots.items():
            for key in slot.layout():
                name = prefix + slot.attribute(key)
                if isinstance(state_dict.get(name), Tensor):
                    state_dict[name] = _as_bits(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


def _frozen(tensor: Tensor, like: nn.Parameter | None = None) -> nn.Parameter:
    """A Parameter without gradient, with the Python attributes of `like` (loaders leave marks there)."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter.__dict__.update({} if like is None else like.__dict__)
    return parameter


def _as_bits(tensor: Tensor) -> Tensor:
    """A float tensor as the integers of the same bits."""
    return tensor.view(_BITS[tensor.dtype]) if tensor.is_floating_point() else tensor


def _as_float(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_as_bits`, for a tensor whose dtype in the layout is `dtype`."""
    return tensor.view(dtype) if dtype.is_floating_point and not tensor.is_floating_point() else tensor
