"""Norms, gates and attention of one token in one call each, where the code of a model takes ten.

A decode step on a CPU multiplies for some 30 ms and spends half as long again in a thousand small operations, each of which is
Python and a pass over cold caches; on a GPU each is a launch, as long as half of a product. `install` gives modules of three kinds
a subclass of their own class, with another `forward` for what it can do in native code (`hfq.kernels.decode`) and the old one
for all else: gradients, compilers, several tokens at a time, another attention implementation. Names, parameters, hooks, adapters
and saving are untouched; projections are called as modules.

Which modules compute what a kernel does is found by experiment, not by their names (`decode_experiments.py`); what a module of the
subclass does stands in `decode_modules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..kernels import native
from .decode_experiments import examine_attention, examine_gate, examine_norm
from .decode_modules import Native, NativeAttention, NativeGate, NativeNorm, Settings, native_class

__all__ = ["install", "remove"]

_EXAMINATIONS: dict[str, tuple[type[Native], Callable[[nn.Module], Settings | None]]] = {
    "norms": (NativeNorm, examine_norm),
    "gates": (NativeGate, examine_gate),
    "attentions": (NativeAttention, examine_attention),
}


@torch.no_grad()
def install(model: nn.Module) -> dict[str, int]:
    """Let modules of the model use native code where that computes the same; how many of which kind.

    Nothing happens without native kernels.
    """
    found = dict.fromkeys(_EXAMINATIONS, 0)
    status = native.load()
    if not (status.cpu or status.cuda):
        return found
    verdicts: dict[Any, Settings | None] = {}
    for module in model.modules():
        for name, (kind, examine) in _EXAMINATIONS.items():
            if isinstance(module, kind):
                found[name] += 1
                break
            key = (name, type(module), *_traits(module))
            if key not in verdicts:
                verdicts[key] = examine(module)
            settings = verdicts[key]
            if settings is not None:
                _change_class(module, native_class(type(module), kind, settings))
                found[name] += 1
                break
    return found


def remove(model: nn.Module) -> None:
    """Give all modules their own classes back."""
    for module in model.modules():
        if isinstance(module, Native):
            _change_class(module, module.plain)


def _change_class(module: nn.Module, new: Any) -> None:
    """Where accelerate has hooked the module (several GPUs), it keeps the forward that the module had then."""
    hooked = module.__dict__.get("_old_forward")
    if getattr(hooked, "__func__", None) is type(module).forward:
        module._old_forward = new.forward.__get__(module)
    module.__class__ = new


def _traits(module: nn.Module) -> Iterator[Any]:
    """What may tell modules of one class apart."""
    for name, value in module.__dict__.items():
        if isinstance(value, (bool, int, float, str, type(None))) and name != "layer_idx":
            yield name, value
    for name, each in module._modules.items():
        yield name, type(each), getattr(each, "out_features", None)
    for name, parameter in module._parameters.items():
        yield name, None if parameter is None else parameter.dim()
    yield from module._buffers
    yield id(getattr(module, "config", None))
