"""The packed tensors of a module: Parameters that rest in the neutral layout or in that of a kernel.

They are Parameters without gradient, so that offloading, tying and sharding treat them like any weight. Scales and
zero points are held as the integers of the same bits (float16 as int16): a cast of the whole model, an upcast
before training or a question for the model's dtype must not reach them. State dicts and checkpoints have them as
floats.

They are in the neutral layout of their format until `prepare` turns them into the layout of the kernel that was
chosen for their device; the same Parameters hold either, so there is one copy in memory. Everything that leaves
the module (state dict, copies, `.to`) sees the neutral layout. Parameters that FSDP2 shards stay as they are: what it
gathers for a forward is what kernels read (sharding.py).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..core.activations import check_input_scale
from ..core.errors import CheckpointError, KernelError, WeightError
from ..core.weight import Grid
from ..formats import FORMATS, INPUT_SCALE, check_tensors
from ..kernels import dispatch
from ..kernels.row import KernelRow, Problem
from .layout import (
    as_bits,
    as_float,
    in_kernel_layout,
    kernel_grid,
    neutral_grid,
    show_to_kernels,
    to_kernel,
    to_neutral,
    wait_for_streams,
)
from .sharding import is_sharded, sendable, shard_like, whole
from .siblings import Siblings, is_capturing
from .slot import PackedSlot

__all__ = ["Operands", "PackedParameters", "frozen"]

# Two threads may meet in the first forward of a module.
_PREPARING = threading.RLock()


@dataclass(frozen=True, kw_only=True)
class Operands:
    """A slot as a kernel reads it.

    Attributes:
        choice: the kernel, and why others were refused.
        grid: in the kernel's layout.
        name, codes: the Parameter that holds the codes. Where another one has taken its place in the module, the
            operands are outdated.
        copies: neutral tensors that were handed out and are still in use somewhere.
        siblings: which other modules read the same input.
    """

    choice: dispatch.Choice
    grid: Grid
    name: str
    codes: Tensor
    copies: MutableMapping[str, Tensor] = field(default_factory=WeakValueDictionary)
    siblings: Siblings = field(default_factory=Siblings)


class PackedParameters(nn.Module):
    """Mixin: the packed Parameters of one or more slots, and the kernel that reads them.

    Attributes:
        slots: the packed weights by the name of the float parameter they replace.
    """

    slots: dict[str, PackedSlot]
    # Operands of the slots whose tensors are in a kernel's layout.
    _prepared: dict[str, Operands]
    # The module whose tensors this one uses (tied weights), in a tuple so that it is no submodule.
    _owner: tuple[PackedParameters, ...] = ()
    # Once FSDP2 sets the Parameters, in parts and gathered in turns: the kernel of each slot that was prepared before, whose layout they are in.
    _sharded_for: dict[str, KernelRow[Any]] | None = None

    def _init_slots(self, slots: Mapping[str, PackedSlot], device: Any) -> None:
        """Register the packed parameters, uninitialised, in the neutral layout."""
        self.slots = dict(slots)
        self._prepared = {}
        for slot in self.slots.values():
            for key, entry in slot.layout().items():
                empty = torch.empty(entry.shape, dtype=entry.dtype, device=device)
                if key == INPUT_SCALE:
                    # Whoever forgets to set it gets NaN, not numbers.
                    empty.fill_(torch.nan)
                # On meta the floats stay floats: a loader compares and casts by the dtype of the checkpoint.
                self._parameters[slot.attribute(key)] = frozen(
                    empty if empty.is_meta else as_bits(empty)
                )

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
        return (
            held if held is not None and held.dim() == len(self.slots[base].float_shape) else None
        )

    def hold_place(self, base: str, parameter: nn.Parameter) -> None:
        """Register the float parameter of a skeleton as `placeholder`."""
        self._parameters[base] = frozen(parameter.data)

    def drop_placeholder(self, base: str) -> None:
        """The float tensor has arrived: only packed Parameters remain, on meta where they are not set yet."""
        if self.placeholder(base) is None:
            return
        del self._parameters[base]
        slot = self.slots[base]
        if slot.attribute("weight") == base:
            entry = slot.layout()["weight"]
            self._parameters[base] = frozen(
                torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            )

    def neutral_tensors(self, base: str) -> dict[str, Tensor]:
        """The tensors of one slot as a checkpoint stores them; copies where the kernel layout differs.

        As long as somebody holds a copy it is handed out again, also by a module that shares the weight: so both
        names of a tied weight show one storage, and savers write it once.
        """
        if self._owner:
            return self._owner[0].neutral_tensors(base)
        layout = self.slots[base].layout()
        # (Of parts none is kept: all processes have to gather a weight, or none.)
        kept = base in self._prepared and not self.is_sharded_out
        copies = self._prepared[base].copies if kept else {}
        tensors = dict(copies)
        if tensors.keys() != self.packed_parameters(base).keys():
            held = self._held_neutral(base)
            tensors = {key: as_float(tensor, layout[key].dtype) for key, tensor in held.items()}
            copies.update(tensors)
        return tensors

    def check_packed(self, name: str) -> None:
        """Compare all packed tensors with their layouts, and what a kernel relies on with their values.

        Raises:
            CheckpointError: they differ; it names the module.
        """
        for base, slot in self.slots.items():
            tensors = self.neutral_tensors(base)
            check_tensors(name, tensors, slot.layout())
            if INPUT_SCALE in tensors and not check_input_scale(tensors[INPUT_SCALE]):
                raise CheckpointError(
                    f"{name}: expected scales of activations above 0, got {tensors[INPUT_SCALE].tolist()}; the "
                    "checkpoint is damaged"
                )
            try:
                self._check_values(base, tensors)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from error

    @torch.no_grad()
    def set_packed(self, base: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the neutral tensors of a slot in place. Tensors saved for a pending backward stay valid: storage is
        replaced.

        Raises:
            CheckpointError: a tensor is missing, its shape or dtype is not the slot's, or indices in it are wrong.
            KernelError: FSDP2 has shared the weights out.
        """
        if self._owner:
            self._owner[0].set_packed(base, tensors)
            return self._follow_owner()
        self._check_not_sharded("writing a packed weight")
        slot = self.slots[base]
        check_tensors(base, tensors, slot.layout())
        self._check_values(base, tensors)
        was_prepared = self._prepared.pop(base, None) is not None
        for key, tensor in tensors.items():
            name = slot.attribute(key)
            parameter = self._parameters[name]
            if parameter is None or parameter.is_meta or parameter.device != tensor.device:
                self._parameters[name] = frozen(as_bits(tensor))
            else:
                parameter.data = as_bits(tensor)
        if was_prepared:
            self.prepare()

    def share_packed(self, other: PackedParameters, base: str = "weight") -> None:
        """Use the very tensors of another module's slot, in that module's kernel layout (tied weights).

        The kernel is that of `other`: an embedding should share the table of the output head, not the reverse.

        Raises:
            WeightError: the slots differ.
        """
        if self.slots[base] != other.slots[base]:
            raise WeightError(
                f"expected equal slots for a shared weight, got {self.slots[base]} and {other.slots[base]}"
            )
        self._prepared.clear()
        self._owner = other._owner or (other,)
        self._follow_owner()

    def _follow_owner(self) -> None:
        """Show the owner's Parameters as our own; `load_state_dict(assign=True)` and the like replace them there."""
        for base, slot in self.slots.items():
            for key, parameter in self._owner[0].packed_parameters(base).items():
                self._parameters[slot.attribute(key)] = parameter

    def _check_values(self, base: str, tensors: Mapping[str, Tensor]) -> None:
        if not any(tensor.is_meta for tensor in tensors.values()):
            slot = self.slots[base]
            FORMATS.get(slot.format).check_values(tensors, slot.in_features)

    def _held_neutral(self, base: str) -> dict[str, Tensor]:
        """What the Parameters of a slot hold, brought into the neutral layout; in parts where they are in parts."""
        slot = self.slots[base]
        held = {key: parameter.detach() for key, parameter in self.packed_parameters(base).items()}
        if not in_kernel_layout(slot, held):
            return {key: sendable(tensor) for key, tensor in held.items()}
        complete = {key: whole(tensor) for key, tensor in held.items()}
        known = self._prepared.get(base)
        choice = self._choose(neutral_grid(slot, complete)) if known is None else known.choice
        neutral = to_neutral(slot, complete, choice.row)
        return {key: shard_like(tensor, held[key]) for key, tensor in neutral.items()}

    # ---- kernel layout

    @property
    def is_offloaded(self) -> bool:
        """Weights that a hook fetches for each call are used as they are stored."""
        if self._offloading_hooks():
            return True
        return any(p.is_meta for base in self.slots for p in self.packed_parameters(base).values())

    def _offloading_hooks(self) -> list[Any]:
        """Those of accelerate that fetch the weights for each call."""
        hook = getattr(self, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        return [one for one in hooks if getattr(one, "offload", False)]

    def _follow_offloading(self) -> None:
        """A hook has put Parameters on meta, bits in whatever layout they were in. It will bring what stood in the state dict,
        neutral floats, and would cast them, number by number, to integers: on meta they are to be what it brings.
        """
        maps = [getattr(hook, "weights_map", None) or {} for hook in self._offloading_hooks()]
        for base, slot in self.slots.items():
            layout = slot.layout()
            for key, held in self.packed_parameters(base).items():
                entry, name = layout[key], slot.attribute(key)
                expected = (tuple(entry.shape), entry.dtype)
                if not held.is_meta or (tuple(held.shape), held.dtype) == expected:
                    continue
                brought = [tensor for each in maps if (tensor := each.get(name)) is not None]
                if brought and (tuple(brought[0].shape), brought[0].dtype) == expected:
                    empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                    self._parameters[name] = frozen(empty, like=held)
                    self._prepared.pop(base, None)

    def _follow_sharding(self, name: str, value: nn.Parameter) -> bool:
        """Whether a Parameter that is being set is what the module holds by this name, in parts or gathered, as FSDP2 does it in turns.

        Takes note of the first parts, and shows kernels what was gathered.

        Raises:
            KernelError: it was cast on the way.
        """
        held = self._parameters.get(name)
        if held is None or held.shape != value.shape:
            return False
        if held.dtype != value.dtype:
            if not is_sharded(held):
                return False
            raise KernelError(
                f"expected {name} to be gathered as {held.dtype}, got {value.dtype}: something cast a packed weight on its way. FSDP2 of PyTorch 2.12 "
                "and later leaves integers as they are, whatever param_dtype a MixedPrecisionPolicy has: update PyTorch, or leave param_dtype out."
            )
        if is_sharded(value):
            if self._sharded_for is None:
                known = self._prepared.items()
                self._sharded_for = {base: operands.choice.row for base, operands in known}
                self._prepared.clear()  # it has the whole weight, which is to go
            return True
        if held is value:  # of a module that shares it
            return self.is_sharded_out
        if is_sharded(held) and any(
            name == slot.attribute("weight") for slot in self.slots.values()
        ):
            show_to_kernels(value)  # gathered a moment ago, with all others of the module
        return is_sharded(held)

    @property
    def is_sharded_out(self) -> bool:
        """Whether FSDP2 sets the Parameters: layouts stay, and nobody else is to write them."""
        return (self._owner[0] if self._owner else self)._sharded_for is not None

    def _check_not_sharded(self, what: str) -> None:
        if self.is_sharded_out:
            raise KernelError(
                f"{what} after FSDP2 (fully_shard) has shared out the packed weights of the model is not possible: do it before"
            )

    def _has_parts_only(self, base: str) -> bool:
        return self.is_sharded_out and any(map(is_sharded, self.packed_parameters(base).values()))

    def prepare(self) -> None:
        """Choose a kernel for each slot and bring its tensors into that kernel's layout, in place."""
        holder = self._owner[0] if self._owner else self
        # A tensor made in inference mode could never be saved for a backward.
        with _PREPARING, torch.inference_mode(False):
            if not holder.is_offloaded:
                for base in holder.slots:
                    holder._prepare(base)

    # What `torch.compiler.assume_constant_result` sets: a compiler calls `prepare` while it traces and compiles what
    # comes after. The decorator itself would import the compiler, which takes longer than all of hfq.
    prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _prepare(self, base: str) -> None:
        if self._is_prepared(base):
            return
        slot, parameters = self.slots[base], self.packed_parameters(base)
        if not all(isinstance(parameter, nn.Parameter) for parameter in parameters.values()):
            return  # lent for one call by `torch.func.functional_call`
        if self._sharded_for is not None:
            return self._prepare_gathered(base)
        if is_capturing(parameters["weight"]):
            # It would be done in each replay, from memory that is somebody else's by then.
            raise KernelError(
                "a weight cannot be brought into its kernel's layout while a CUDA graph is captured: run the model once before"
            )
        held = self._held_neutral(base)
        # Whatever put them in place: a kernel follows the indices in them without looking.
        self._check_values(base, held)
        grid = neutral_grid(slot, held)
        choice = self._choose(grid)
        grid, held = to_kernel(grid, held, choice.row)
        wait_for_streams(parameters["weight"])
        for key, parameter in parameters.items():
            shared: bool = parameter.is_shared()  # type: ignore[no-untyped-call]
            parameter.data = held[key].share_memory_() if shared else held[key]  # type: ignore[no-untyped-call]
        name = slot.attribute("weight")
        self._prepared[base] = Operands(
            choice=choice, grid=grid, name=name, codes=parameters["weight"]
        )

    def _prepare_gathered(self, base: str) -> None:
        """What FSDP2 has gathered is read where it is, in the layout that it was sharded in."""
        before = (self._sharded_for or {}).get(base)
        if before is None or self._has_parts_only(base):
            return  # (None: what is gathered is not to be brought into another layout each time)
        slot, parameters = self.slots[base], self.packed_parameters(base)
        held = {key: parameter.detach() for key, parameter in parameters.items()}
        grid = neutral_grid(slot, held)
        choice = self._choose(grid)
        if before is not choice.row:
            raise KernelError(
                f"expected weights in the layout of {choice.row.name}, which {parameters['weight'].device} takes, got that of {before.name}: "
                "FSDP2 (fully_shard) has moved the model. Move it to the device of its process before, such as by "
                'from_pretrained(..., device_map={"": local_rank})'
            )
        operands = Operands(
            choice=choice,
            grid=kernel_grid(grid, held, choice.row),
            name=slot.attribute("weight"),
            codes=parameters["weight"],
        )
        operands.siblings.leave(for_good=True)  # weights stay where they are
        self._prepared[base] = operands

    def _is_prepared(self, base: str) -> bool:
        found = self._prepared.get(base)
        return found is not None and found.codes is self._parameters[found.name]

    def _is_prepared_at_all(self) -> bool:
        return bool((self._owner[0] if self._owner else self)._prepared)

    def restore(self) -> None:
        """Bring all tensors back into the neutral layout, in place. Those that are sharded stay in the one they have."""
        holder = self._owner[0] if self._owner else self
        if holder._sharded_for is not None:
            return holder._prepared.clear()
        with _PREPARING, torch.inference_mode(False):
            for base in holder.slots:
                held, parameters = holder._held_neutral(base), holder.packed_parameters(base)
                moved = [
                    key for key, held_by in parameters.items() if held_by.dim() != held[key].dim()
                ]
                if moved:
                    wait_for_streams(parameters["weight"])
                for key in moved:
                    parameters[key].data = held[key]
            holder._prepared.clear()

    def operands(self, base: str) -> Operands:
        """The kernel of a slot and what it reads: prepared, or as stored where that is not possible."""
        if torch.compiler.is_compiling():
            if _is_exporting():
                return self._as_stored(base, "an exported program runs anywhere")
            self.prepare()
        if self._owner:
            shared = self._owner[0].operands(base)
            if shared.codes is not self._parameters[shared.name]:
                self._follow_owner()
            return shared
        found = self._prepared.get(base)
        # The question of `_is_prepared` without its call: this runs in every forward.
        if found is not None and found.codes is self._parameters[found.name]:
            return found
        self.prepare()
        if self._is_prepared(base):
            return self._prepared[base]
        if self._has_parts_only(base):
            raise KernelError(
                "expected a whole packed weight, got a part of one (DTensor): fully_shard (FSDP2) gathers them for a module's forward, "
                "its `unshard` at other times"
            )
        sharded = "the weights were sharded as they are stored"
        fetched = "the weights are offloaded and fetched for each call"
        return self._as_stored(base, sharded if self.is_sharded_out else fetched)

    def grid(self, base: str) -> Grid:
        """What the slot's kernel reads."""
        return self.operands(base).grid

    def kernel(self, base: str) -> KernelRow[Any]:
        """The kernel that reads `grid(base)`."""
        return self.operands(base).choice.row

    def kernel_choice(self, base: str) -> dispatch.Choice:
        """The kernel of a slot and why others were refused."""
        if self._has_parts_only(base) and base in self._prepared:
            return self._prepared[base].choice  # of what was gathered last
        return self.operands(base).choice

    def _choose(self, grid: Grid) -> dispatch.Choice:
        return dispatch.select(Problem.of(grid))

    def _as_stored(self, base: str, reason: str) -> Operands:
        """Operands that are not kept, for the kernel that reads the neutral layout."""
        slot = self.slots[base]
        grid = neutral_grid(slot, self._held_neutral(base))
        return Operands(
            choice=dispatch.as_stored(grid, reason),
            grid=grid,
            name=slot.attribute("weight"),
            codes=grid.qweight,
            copies={},
        )


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# Really called while a compiler traces: torch 2.11 would take the answer for True under `torch.compile`, too.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def frozen(tensor: Tensor, like: nn.Parameter | None = None) -> nn.Parameter:
    """A Parameter without gradient, with the Python attributes of `like` (loaders leave marks there)."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter.__dict__.update({} if like is None else like.__dict__)
    return parameter
