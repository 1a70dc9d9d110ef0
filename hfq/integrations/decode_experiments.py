"""Which modules compute what a kernel of a decode step does: found by experiment, not by their names.

The module's own code and the native one both run on a stand-in with random projections in float32, with and without masks, at near and
far positions, and have to agree. What is found are the class attributes with which they do, or None.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import decode
from .decode_modules import Settings, epsilon, native_attention, native_gate

__all__ = ["examine_attention", "examine_gate", "examine_norm"]

# Relative difference of both codes in float32: sums in another order stay ten times below, another formula far above.
_TOLERANCE = 1e-5

# What code raises that misses something, or gets tensors of shapes that it does not expect.
_NOT_THERE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)


class _Stub:
    """Stands for a projection: gives what it was told, remembers what it got."""

    def __init__(self, output: Tensor) -> None:
        self.output = output
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.output


class _Past:
    """Stands for a cache of keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.seen: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.seen += [keys, values]
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)


def _stand_in(
    module: nn.Module,
    parameters: dict[str, Tensor] | None = None,
    modules: dict[str, Any] | None = None,
) -> Any:
    """The module with other parts, without its hooks."""
    made = object.__new__(type(module))
    made.__dict__ = {
        **nn.Module().__dict__,
        **{k: v for k, v in module.__dict__.items() if not k.startswith(("_", "forward"))},
        "_parameters": dict(parameters or {}),
        "_modules": {**module._modules, **(modules or {})},
        "training": False,
    }
    return made


class _Random:
    """Numbers of a normal distribution, float32 on the CPU whatever the defaults are."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float32, device="cpu")


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return bool((ours - theirs).norm() <= _TOLERANCE * theirs.norm())


def _outcome(run: Callable[[], Any]) -> Any:
    """What the code of a model gives; None where it wants something that a stand-in does not have."""
    try:
        return run()
    except _NOT_THERE:
        return None


def examine_norm(module: nn.Module) -> Settings | None:
    """Of `NativeNorm`; for a module with one parameter, a vector, and nothing else."""
    weight = module._parameters.get("weight")
    if (
        weight is None
        or weight.dim() != 1
        or len(module._parameters) > 1
        or module._buffers
        or module._modules
        or not isinstance(epsilon(module), float)
    ):
        return None
    normal, columns = _Random(), weight.shape[0]
    gain, x = normal(columns), normal(3, 1, columns)
    for offset, round_first in itertools.product((0.0, 1.0), (True, False)):

        def agrees(dtype: torch.dtype, offset: float = offset, first: bool = round_first) -> bool:
            probe, given = _stand_in(module, {"weight": gain.to(dtype)}), x.to(dtype)
            theirs = _outcome(lambda: type(module).forward(probe, given))
            ours = decode.rms_norm(given, gain.to(dtype), epsilon(module), offset, first)
            # The reference does the same operations in the same order.
            return isinstance(theirs, Tensor) and torch.equal(ours, theirs)

        if agrees(torch.float32) and agrees(torch.bfloat16):
            return (("offset", offset), ("round_first", round_first))
    return None


def examine_gate(module: nn.Module) -> Settings | None:
    """Of `NativeGate`; for a module with projections of the usual names."""
    if module._parameters or not {"gate_proj", "up_proj", "down_proj"} <= module._modules.keys():
        return None
    x, gate, up, down = _Random()(4, 3, 1, 160).unbind()

    def run(forward: Callable[..., Any], **settings: Any) -> list[Any] | None:
        stubs = {"gate_proj": _Stub(3 * gate), "up_proj": _Stub(up), "down_proj": _Stub(down)}
        probe = _stand_in(module, modules=stubs)
        vars(probe).update(settings)
        y = forward(probe, x)
        seen = [stub.seen for stub in stubs.values()]
        right = y is down and len(seen[2]) == 1 and all(len(s) == 1 and s[0] is x for s in seen[:2])
        return seen[2] if right else None

    theirs = _outcome(lambda: run(type(module).forward))
    for tanh_gelu in (False, True):
        ours = run(native_gate, tanh_gelu=tanh_gelu)
        if theirs is not None and ours is not None and _same(ours[0], theirs[0]):
            return (("tanh_gelu", tanh_gelu),)
    return None


def examine_attention(module: nn.Module) -> Settings | None:
    """Of `NativeAttention`, which has none: an empty tuple; for a module with projections of the usual names."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    sizes: list[Any] = [getattr(module._modules.get(n), "out_features", None) for n in names]
    size = module.__dict__.get("head_dim")
    if (
        module._parameters
        or None in sizes
        or not isinstance(size, int)
        or size % 16
        or not isinstance(module.__dict__.get("scaling"), float)
        or getattr(module.config, "_attn_implementation", None) != "sdpa"
    ):
        return None
    normal, batch, past = _Random(), 2, 4
    x, y = normal(batch, 1, 16), normal(batch, 1, 16)
    q, k, v = (2.5 * normal(batch, 1, width) for width in sizes[:3])
    keys, values = (2.5 * normal(batch, each.shape[-1] // size, past, size) for each in (k, v))
    angle = normal(batch, 1, size // 2).repeat(1, 1, 2)
    seen = normal(batch, 1, 1, past + 1) > -0.2
    seen[..., -1] = True

    def run(forward: Callable[..., Any], **step: Any) -> list[Tensor] | None:
        stubs = [_Stub(each) for each in (q, k, v, y)]
        probe = _stand_in(module, modules=dict(zip(names, stubs, strict=True)))
        cache = _Past(keys, values)
        found = forward(probe, hidden_states=x, past_key_values=cache, **step)
        right = (
            isinstance(found, tuple)
            and len(found) == 2
            and found[0] is y
            and found[1] is None
            and all(len(stub.seen) == 1 for stub in stubs)
            and all(stub.seen[0] is x for stub in stubs[:3])
        )
        return [stubs[3].seen[0], *cache.seen] if right else None

    for position, mask in itertools.product((past, 10**6), (None, seen, (seen.float() - 1) * 1e9)):
        step = {
            "position_embeddings": (angle.cos(), angle.sin()),
            "attention_mask": mask,
            "position_ids": torch.full((batch, 1), position, device="cpu"),
            "use_cache": True,
        }
        theirs = _outcome(partial(run, type(module).forward, **step))
        ours = None if theirs is None else _outcome(partial(run, native_attention, **step))
        if ours is None or not all(map(_same, ours, theirs)):
            return None
    return ()
