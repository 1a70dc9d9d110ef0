"""What every module with packed weights shares: the float weight behind the codes, moving, saving, loading."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import affine
from ..core.errors import KernelError, WeightError
from ..core.weight import QuantizedWeight
from ..formats import INPUT_SCALE
from .layout import as_bits
from .packing import Encode, pack_weight
from .parameters import PackedParameters, frozen
from .slot import PackedSlot
from .virtual_weight import VirtualWeight

__all__ = ["KERNEL_MODES", "PackedModule", "packed_names"]

# How a kernel may treat activations of few tokens:
#   exact  in float32
#   int8   quantized to 8 bits per token and block of columns, where the kernel can (integer dot products)
#   auto   exact for float32 inputs, in training mode and where gradients flow; int8 for 16-bit inputs elsewhere,
#          whose own rounding is of the same size
# A weight whose format asks for int8 activations (W8A8) has them in every mode: there they are part of the model.
KERNEL_MODES = ("auto", "exact", "int8")

# One text for all weights, so that Python shows it once.
_ROUNDED_AGAIN = (
    "a packed weight was written to and rounded to its format again, which changes its values; to merge an adapter "
    "without that loss, call hfq.merge_to_float(model) first"
)


class PackedModule(PackedParameters):
    """Mixin: a module with one or more packed weights.

    Attributes:
        kernel_mode: one of `KERNEL_MODES`.
        compute_dtype: dtype of the virtual float weight; follows ``.to(dtype)``.
    """

    kernel_mode: str
    compute_dtype: torch.dtype
    _owner: tuple[PackedModule, ...] = ()

    def _init_packed(
        self, slots: Mapping[str, PackedSlot], dtype: torch.dtype, device: Any
    ) -> None:
        """Register the packed parameters of the slots, uninitialised."""
        self._init_slots(slots, device)
        self.kernel_mode = "auto"
        self.compute_dtype = dtype

    # ---- the float weight

    def dequantize(self, base: str = "weight") -> Tensor:
        """The weight behind the codes, detached, in `compute_dtype`: `[N, K]` or `[E, N, K]`."""
        slot, dtype = self.slots[base], self.compute_dtype
        with torch.no_grad():
            row, grid = self.kernel(base), self.grid(base)
            if slot.experts is None:
                return row.dequantize(grid, dtype)
            stack = torch.empty(slot.float_shape, dtype=dtype, device=grid.qweight.device)
            for index in range(slot.experts):
                stack[index] = row.dequantize(grid.expert(index), dtype)
            return stack

    def _virtual_weight(self) -> Tensor:
        """What `module.weight` is for a module with the one slot "weight"."""
        if self._owner:
            return self._owner[0]._virtual_weight()
        waiting = self.placeholder("weight")
        if waiting is not None:
            return waiting
        slot = self.slots["weight"]
        return VirtualWeight(
            shape=slot.float_shape,
            dtype=self.compute_dtype,
            codes=self.packed_parameters("weight")["weight"],
            read=self.dequantize,
            write=self._set_weight,
            description=f"{slot.format} {slot.spec.bits} bits",
        )

    def _set_weight(self, weight: Tensor) -> None:
        codes = self.packed_parameters("weight")["weight"]
        weight = weight.detach() if codes.is_meta else weight.detach().to(codes.device)
        self.requantize("weight", weight)
        if not torch.equal(self.dequantize(), weight.to(self.compute_dtype)):
            warnings.warn(_ROUNDED_AGAIN, stacklevel=2)

    @torch.inference_mode(False)
    def requantize(self, base: str, weight: Tensor, encode: Encode | None = None) -> None:
        """Quantize a float weight into the slot, by rounding to nearest unless `encode` says otherwise.

        The module is unchanged if that fails. A static scale of its activations stays.
        """
        self._check_not_sharded("writing a packed weight")
        spec = self.slots[base].spec

        def round_to_nearest(rows: Tensor) -> QuantizedWeight:
            return affine.encode(rows, *affine.range_grid(rows, spec), spec)

        packed = pack_weight(weight, self.slots[base], encode or round_to_nearest)
        if spec.activation == "static":
            packed[INPUT_SCALE] = self.neutral_tensors(base)[INPUT_SCALE]
        self.set_packed(base, packed)

    def int8_activations(self, x: Tensor) -> bool:
        """Whether a kernel may quantize the activations x; see `KERNEL_MODES`."""
        if self.kernel_mode != "auto":
            return self.kernel_mode == "int8"
        if self.training or x.dtype not in (torch.bfloat16, torch.float16):
            # Training as a whole: a checkpointed block runs without gradients first and must give the same.
            return False
        return not (x.requires_grad and torch.is_grad_enabled())

    # ---- torch.nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        slots: Mapping[str, PackedSlot] = self.__dict__.get("slots", {})
        if name == "weight" and "weight" in slots:
            return self._assign_weight(value)
        if name == "_hf_hook" and slots:
            super().__setattr__(name, value)
            return self._follow_offloading()
        if isinstance(value, nn.Parameter) and any(
            name == slot.attribute(key) for slot in slots.values() for key in slot.layout()
        ):
            if self._owner:
                setattr(self._owner[0], name, value)
                return self._follow_owner()
            if self._follow_sharding(name, value):
                return super().__setattr__(name, value)
            self.restore()
            if value.is_floating_point() and not value.is_meta:
                value = frozen(as_bits(value.data), like=value)
        super().__setattr__(name, value)

    def _assign_weight(self, value: object) -> None:
        if not isinstance(value, Tensor):
            raise WeightError(
                f"expected a float tensor for a packed weight, got {type(value).__name__}"
            )
        weight = self._virtual_weight()
        if isinstance(weight, VirtualWeight):
            weight.assign(value)
        else:
            self._set_weight(value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the neutral layout: the reader may have other kernels."""
        self.restore()
        return self.__dict__.copy()

    def _replicate_for_data_parallel(self) -> PackedModule:
        """Replicas would have no Parameters, only views of what was sent to their GPUs for one call."""
        raise KernelError(
            "nn.DataParallel cannot copy packed weights to other GPUs. Start a process for each GPU (torchrun, accelerate launch), "
            "or show the program one of them (CUDA_VISIBLE_DEVICES=0): Transformers' Trainer takes DataParallel where it sees several"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move packed tensors; casts do not reach them, `compute_dtype` follows instead."""
        was_prepared = self._is_prepared_at_all()
        self.restore()
        packed = {id(p): p for base in self.slots for p in self.packed_parameters(base).values()}
        device = next(iter(packed.values())).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in packed:
                return fn(tensor)
            if self._owner:
                return tensor
            moved = fn(tensor)
            # `module.type(dtype)` casts integers too.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._hold_bits()
        if self._owner:
            self._owner[0]._apply(fn, recurse)
            self._follow_owner()
        if was_prepared:
            self.prepare()
        return self

    def _hold_bits(self) -> None:
        """Floats on meta stay floats; once they have memory (`to_empty`), they are held like all others."""
        for base in self.slots:
            for parameter in self.packed_parameters(base).values():
                if not parameter.is_meta:
                    parameter.data = as_bits(parameter.data)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for base, slot in self.slots.items():
            for key, tensor in self.neutral_tensors(base).items():
                destination[prefix + slot.attribute(key)] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        was_prepared = self._is_prepared_at_all()
        self.restore()
        for slot in self.slots.values():
            for key, entry in slot.layout().items():
                name = prefix + slot.attribute(key)
                tensor = state_dict.get(name)
                if not isinstance(tensor, Tensor):
                    continue
                if self.is_sharded_out:
                    error_msgs.append(
                        f"{name}: packed weights are loaded before fully_shard (FSDP2), not after it, by each process "
                        "(accelerate: fsdp_cpu_ram_efficient_loading: false)"
                    )
                    del state_dict[name]
                elif tensor.dtype != entry.dtype:
                    error_msgs.append(
                        f"{name}: expected a packed tensor of {entry.dtype}, got {tensor.dtype}"
                    )
                    del state_dict[name]
                else:
                    state_dict[name] = as_bits(tensor)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if was_prepared:
            self.prepare()


def packed_names(model: nn.Module) -> Iterator[str]:
    """Names of all packed Parameters of a model."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            for base, slot in module.slots.items():
                for key in module.packed_parameters(base):
                    yield f"{name}.{slot.attribute(key)}" if name else slot.attribute(key)
