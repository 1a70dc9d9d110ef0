"""Modules that read the same input (q, k and v; gate and up) share one call of a kernel.

A decode step makes a hundred calls of some 10 us each, whose cost does not depend on their size. Which modules are
siblings is learnt from the first forwards, not from names: they are those that see the very same tensor, unchanged, one
right after the other. Their weights then move into one memory, of which each Parameter is a part, and the first of them
that sees a new input computes the outputs of all; the others fetch theirs. Each value is what the module alone would give,
bit by bit, and hooks, adapters and replaced modules go on as before: the modules stay who they are.

It happens where Python takes the time: few tokens, no gradients, no compiler. Modules stop sharing for good once an output
was not fetched twice; when one of them gets other tensors, all learn again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..core.weight import Grid
from ..kernels import native
from ..kernels.row import KernelRow, Problem
from .layout import as_bits, show_to_kernels, wait_for_streams

if TYPE_CHECKING:
    from .linear import QuantLinear
    from .parameters import Operands

__all__ = ["MOST_TOKENS", "Siblings", "is_capturing", "shared_output"]

# More of them take so long that a call costs nothing beside it.
MOST_TOKENS = 32

# Times that a module is seen alone, or that an output is not fetched, before that counts as how the model is.
_PATIENCE = 2


# Of modules that see one input so many are remembered; a benchmark may call one with the same tensor a million times.
_MOST_SEEN = 32


class Siblings:
    """What was learnt about one module's operands; mutable.

    Attributes:
        group, place: the group that these operands are in, and where.
        alone: how often nobody else saw the module's input.
    """

    __slots__ = ("alone", "group", "place")

    def __init__(self) -> None:
        self.group: Group | None = None
        self.place = 0
        self.alone = 0

    def leave(self, for_good: bool) -> None:
        """Share no more, or only with whom the next forwards show."""
        self.group, self.alone = None, _PATIENCE if for_good else 0


class _LastInput(threading.local):
    """The last input, and who saw it. Weak references: nothing lives longer for being remembered here."""

    x: weakref.ref[Tensor] | None = None
    version: int = 0
    modules: tuple[weakref.ref[QuantLinear], ...] = ()


_LAST = _LastInput()

_JOINING = threading.Lock()


def shared_output(
    module: QuantLinear, operands: Operands, x: Tensor, int8_activations: bool
) -> Tensor | None:
    """The module's output where it has siblings, else None; in that case it takes note of who sees x.

    Not to be called while a compiler traces.
    """
    siblings = operands.siblings
    group = siblings.group
    if group is None and siblings.alone >= _PATIENCE:
        return None
    if (
        torch.is_grad_enabled()
        or type(x) is not Tensor  # a subclass may be anything, a tensor without memory for one
        or x.numel() > MOST_TOKENS * module.in_features
        or x.is_inference()  # has no version
    ):
        return None
    if group is not None and (work := _work(x)) is not None:
        y = group.output(siblings.place, x, int8_activations, work)
        if siblings.group is not None:
            return y
    if is_capturing(x):
        # A graph keeps the addresses of the weights: they must not move any more.
        if siblings.group is None:
            siblings.leave(for_good=True)
        return None
    # Not of weights that are fetched for each call, nor of those that belong to another module.
    if siblings.alone < _PATIENCE and module._prepared.get("weight") is operands:
        _notice(module, x)
    return None


def is_capturing(x: Tensor) -> bool:
    """Whether the work on x goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _work(x: Tensor) -> tuple[int, int] | None:
    """The stream and the CUDA graph that work on x goes into: an output is there for others of the same only. None: a graph that
    nothing tells from another one.
    """
    if not x.is_cuda:
        return 0, 0
    stream = int(torch._C._cuda_getCurrentRawStream(x.device.index))
    if not is_capturing(x):
        return stream, 0
    graph = native.cuda_graph(stream)
    return (stream, graph) if graph else None


def _notice(module: QuantLinear, x: Tensor) -> None:
    version = x._version
    if _LAST.x is not None and _LAST.x() is x and _LAST.version == version:
        if len(_LAST.modules) < _MOST_SEEN:
            _LAST.modules += (weakref.ref(module),)
        return
    seen = [found for reference in _LAST.modules if (found := reference()) is not None]
    _LAST.x, _LAST.version, _LAST.modules = weakref.ref(x), version, (weakref.ref(module),)
    _settle(seen)


def _settle(modules: Sequence[QuantLinear]) -> None:
    """Modules that saw one input become groups of those with the same kernel."""

    def kind(module: QuantLinear) -> str:
        operands = module.operands("weight")
        problem = replace(Problem.of(operands.grid), out_features=0)
        return f"{operands.choice.row.name} {problem} {module.bias is None}"

    # A module that was called twice belongs to no group, nor does one that went into a graph meanwhile.
    once = [
        module
        for module in modules
        if sum(other is module for other in modules) == 1
        and not module.is_sharded_out  # since then
        and module.operands("weight").siblings.alone < _PATIENCE
    ]
    for _, alike in groupby(sorted(once, key=kind), kind):
        together = list(alike)
        if len(together) < 2 or not _join(together):
            for module in together:
                module.operands("weight").siblings.alone += 1


def _join(modules: Sequence[QuantLinear]) -> bool:
    """Bring the weights of the modules into one memory; False if they cannot be."""
    with _JOINING, torch.inference_mode(False):
        found = [module._prepared.get("weight") for module in modules]
        members = [operands for operands in found if operands is not None]
        if any(operands.siblings.group is not None for operands in members):
            return True  # another thread was faster
        if _get_current_dispatch_mode() is not None:
            return False  # it decides what a new tensor is
        # Parameters in memory that other processes map stay where they are. (PyTorch calls all memory of a GPU shared.)
        if len(members) < len(modules) or any(
            parameter.is_cpu and parameter.untyped_storage().is_shared()
            for module in modules
            for parameter in module.packed_parameters("weight").values()
        ):
            return False
        row = members[0].choice.row
        try:
            stacked = row.stack([operands.grid for operands in members])
        except torch.OutOfMemoryError:
            return False  # a model that fits runs without
        if stacked is None:
            return False
        grid, parts = stacked
        wait_for_streams(grid.qweight)
        joined = [
            _moved(module, operands, part)
            for module, operands, part in zip(modules, members, parts, strict=True)
        ]
        show_to_kernels(joined[0].codes)
        group = Group(row, grid, modules, joined)
        for place, operands in enumerate(joined):
            operands.siblings.group, operands.siblings.place = group, place
        return True


def _moved(module: QuantLinear, operands: Operands, part: Grid) -> Operands:
    """The module's operands once its Parameters are parts of the memory of all."""
    parameters = module.packed_parameters("weight")
    views: dict[str, Any] = {}
    for key, field in part.OPERANDS.items():
        old, new = getattr(operands.grid, field), getattr(part, field)
        if new is None:
            continue
        # Decoded operands live beside the Parameters.
        if parameters[key].data_ptr() == old.data_ptr():
            parameters[key].data = as_bits(new)
        # As in `to_kernel`.
        views[field] = nn.Parameter(new, requires_grad=False)
    moved = replace(operands, grid=replace(part, **views), siblings=Siblings())
    module._prepared["weight"] = moved
    return moved


class Group:
    """Modules whose weights are parts of one."""

    def __init__(
        self,
        row: KernelRow[Any],
        grid: Grid,
        modules: Sequence[QuantLinear],
        operands: Sequence[Operands],
    ) -> None:
        self.row, self.grid = row, grid
        self.sizes = [module.out_features for module in modules]
        self.members = [
            (weakref.ref(module), weakref.ref(own))
            for module, own in zip(modules, operands, strict=True)
        ]
        self.waiting: _Outputs | None = None
        self.missed = 0

    def output(
        self, place: int, x: Tensor, int8_activations: bool, work: tuple[int, int]
    ) -> Tensor | None:
        """What member `place` gives for x, in the stream and graph `work`; None where it has to compute that itself."""
        # One look: another thread may put its own there.
        waiting = self.waiting
        if (
            waiting is not None
            and waiting.x is x
            and (waiting.version, waiting.work) == (x._version, work)
        ):
            y = waiting.parts[place] if waiting.int8 == int8_activations else None
            waiting.parts[place] = None
            if not any(part is not None for part in waiting.parts):
                self.waiting = None
            return y
        if waiting is not None:
            self.waiting = None
            self.missed += 1
        modules = self._modules()
        if modules is not None and self.missed >= _PATIENCE:
            self._part(for_good=True)
            return None
        outputs = None if modules is None else self._product(modules, x, int8_activations)
        if outputs is None:
            return None
        parts: list[Tensor | None] = [part.contiguous() for part in outputs]
        asked, parts[place] = parts[place], None
        self.waiting = _Outputs(x, int8_activations, work, parts)
        return asked

    def outputs(
        self, modules: list[QuantLinear], x: Tensor, int8_activations: bool
    ) -> Sequence[Tensor] | None:
        """What these modules give for x if they are the members, contiguous in the last dimension only."""
        members = self._modules()
        # Modules are equal if they are the same.
        if members is None or members != modules:
            return None
        return self._product(members, x, int8_activations)

    def _product(
        self, modules: Sequence[QuantLinear], x: Tensor, int8_activations: bool
    ) -> Sequence[Tensor] | None:
        """The members' outputs; None, and no group any more, where they differ in what only each call shows."""
        biases: list[Tensor] = []
        alike = True
        for module in modules:
            alike &= module.int8_activations(x) == int8_activations
            if (own := module._parameters["bias"]) is not None:
                biases.append(own)
        if len(biases) not in (0, len(modules)) or not alike:
            self._part(for_good=True)
            return None
        # Not kept: a bias is a Parameter that anybody may write to.
        bias = torch.cat(biases) if biases else None
        y = self.row.linear(x, self.grid, bias, int8_activations)
        return y.split_with_sizes(self.sizes, -1)

    def _modules(self) -> list[QuantLinear] | None:
        """The members; None, and no group any more, if one of them is gone or reads other tensors now."""
        modules = []
        for module_reference, operands_reference in self.members:
            module = module_reference()
            if module is None or module._prepared.get("weight") is not operands_reference():
                self._part(for_good=False)
                return None
            modules.append(module)
        return modules

    def _part(self, for_good: bool) -> None:
        for _, reference in self.members:
            operands = reference()
            if operands is not None:
                operands.siblings.leave(for_good)


class _Outputs:
    """Outputs for one input that wait for their modules."""

    __slots__ = ("int8", "parts", "version", "work", "x")

    def __init__(
        self, x: Tensor, int8: bool, work: tuple[int, int], parts: list[Tensor | None]
    ) -> None:
        self.x, self.version, self.int8, self.work, self.parts = x, x._version, int8, work, parts
