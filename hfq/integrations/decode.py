"""Norms, gates and attention of one token in one call each, where the code of a model takes ten.

A decode step on a CPU multiplies for some 30 ms and spends half as long again in a thousand small operations, each of which is
Python and a pass over cold caches; on a GPU each is a launch, as long as half of a product. `install` gives modules of three kinds
a subclass of their own class, with another `forward` for what it can do in native code (`hfq.kernels.decode`) and the old one
for all else: gradients, compilers, several tokens at a time, another attention implementation. Names, parameters, hooks, adapters
and saving are untouched; projections are called as modules.

Which modules compute what a kernel does is found by experiment, not by their names: both codes run on a stand-in with random
projections in float32, with and without masks, at near and far positions, and have to agree.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels import decode, native
from ..kernels.cuda import no_native_code
from ..nn.linear import products
from . import growing_cache

__all__ = ["install", "remove"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# kernels/cuda/decode.h
_MOST_ATTENDED_BYTES = 512

# Relative difference of both codes in float32: sums in another order stay ten times below, another formula far above.
_TOLERANCE = 1e-5


class _Native(nn.Module):
    """Mixin: a module whose forward may be taken by native code.

    Attributes:
        plain: the class that the module had.
        made_of: arguments of `_new`.
    """

    plain: ClassVar[type[nn.Module]]
    made_of: ClassVar[tuple[Any, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Classes made at run time cannot be pickled: the reader makes its own."""
        made: Any = super().__reduce_ex__(protocol)
        return (_new, self.made_of, *made[2:])


class _NativeNorm(_Native):
    offset: ClassVar[float]
    round_first: ClassVar[bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _applies(self, args[0]):
            x, weight = args[0], self._parameters["weight"]
            if weight is not None and weight.dtype == x.dtype and weight.device == x.device:
                return _norm(self, x, weight)
        return super().forward(*args, **kwargs)


def _norm(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    settings = (_eps(module), module.offset, module.round_first)
    y: Tensor = torch.ops.hfq.rms_norm.default(x.contiguous(), weight, *settings)
    return y


def _eps(module: Any) -> Any:
    attributes = module.__dict__
    return attributes.get("variance_epsilon", attributes.get("eps"))


class _NativeGate(_Native):
    tanh_gelu: ClassVar[bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _applies(self, args[0]):
            return _gated(self, args[0])
        return super().forward(*args, **kwargs)


def _gated(module: Any, x: Tensor) -> Any:
    modules = module._modules
    gate, up = products((modules["gate_proj"], modules["up_proj"]), x)
    gated = torch.ops.hfq.gate.default(gate, up, module.tanh_gelu)
    return products((modules["down_proj"],), gated)[0]


class _NativeAttention(_Native):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and _attends(self, **kwargs):
            return _attention(self, **kwargs)
        return super().forward(*args, **kwargs)


def _attends(
    module: Any,
    hidden_states: Any = None,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: Any = None,
    use_cache: Any = None,
    output_router_logits: Any = None,
    **others: Any,
) -> bool:
    """Whether this call is one token per sequence and asks for nothing that native code does not know.

    Of what models pass on, attention has no use for the last three.
    """
    return (
        not others
        and past_key_values is not None
        and position_embeddings is not None
        and _applies(module, hidden_states)
        and hidden_states.dim() == 3
        and hidden_states.shape[1] == 1
        and position_embeddings[0].dtype == hidden_states.dtype
        and _mask_fits(attention_mask, hidden_states)
        and (hidden_states.is_cpu or _attends_on_cuda(hidden_states, position_embeddings[0]))
        and module.config._attn_implementation == "sdpa"
        and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    )


def _mask_fits(mask: Any, x: Tensor) -> bool:
    if mask is None:
        return True
    return type(mask) is Tensor and mask.dim() == 4 and mask.dtype in (torch.bool, x.dtype)


def _attends_on_cuda(x: Tensor, cos: Tensor) -> bool:
    """Heads fit the lanes of a warp."""
    return cos.shape[-1] * x.dtype.itemsize <= _MOST_ATTENDED_BYTES


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any,
    attention_mask: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    modules, x = module._modules, hidden_states
    q, k, v = products((modules["q_proj"], modules["k_proj"], modules["v_proj"]), x)
    cos, sin = position_embeddings
    if "q_norm" in modules:
        q, k = (
            _normed(modules[name], each, cos.shape[-1])
            for name, each in (("q_norm", q), ("k_norm", k))
        )
    q, k = torch.ops.hfq.rotate.default(q, k, cos, sin)
    found = growing_cache.append(past_key_values, module.layer_idx, k, v)
    if found is None:
        keys, values = past_key_values.update(k, v.view(k.shape), module.layer_idx)
        found = keys.contiguous(), values.contiguous(), keys.shape[2]
    mask = attention_mask
    if mask is not None:
        if mask.stride(0) == 0:
            mask = mask[:1]  # one for all sequences
        mask = mask.contiguous()
    y = torch.ops.hfq.attend.default(q, *found, mask, module.scaling)
    return products((modules["o_proj"],), y)[0], None


def _normed(norm: Any, x: Tensor, size: int) -> Any:
    return norm(x.reshape(*x.shape[:2], -1, size)).view(x.shape)


def _applies(module: Any, x: Any) -> bool:
    """Whether nothing but numbers is asked for: no gradients, no compiler, no mode that watches operators.

    Nor in training: a checkpointed block runs without gradients first and must give the same.
    """
    return (
        not module.training
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and _runs_on(x.device.type)
        and x.dtype in _DTYPES
        and not torch._C._is_any_autocast_enabled()
        and _get_current_dispatch_mode() is None
    )


@functools.cache
def _runs_on(device: str) -> bool:
    """Whether there is native code for a kind of device."""
    if device == "cuda":
        return no_native_code() is None
    return device == "cpu" and native.load().cpu


# ---- which modules


@torch.no_grad()
def install(model: nn.Module) -> dict[str, int]:
    """Let modules of the model use native code where that computes the same; how many of which kind.

    Nothing happens without native kernels.
    """
    found = dict.fromkeys(_EXAMINATIONS, 0)
    status = native.load()
    if not (status.cpu or status.cuda):
        return found
    verdicts: dict[Any, _Settings | None] = {}
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
                module.__class__ = _native_class(type(module), kind, settings)
                found[name] += 1
                break
    return found


def remove(model: nn.Module) -> None:
    """Give all modules their own classes back."""
    for module in model.modules():
        if isinstance(module, _Native):
            module.__class__ = module.plain  # type: ignore[assignment]


# Class attributes of a mixin.
_Settings = tuple[tuple[str, Any], ...]

_CLASSES: dict[Any, Any] = {}


def _native_class(plain: type[nn.Module], kind: type[_Native], settings: _Settings) -> Any:
    """A subclass under the same name: what looks for a class by its name finds it."""
    made_of = (plain, kind, settings)
    if made_of not in _CLASSES:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        own = {"plain": plain, "made_of": made_of, **dict(settings)}
        _CLASSES[made_of] = type(plain.__name__, (kind, plain), names | own)
    return _CLASSES[made_of]


def _new(plain: type[nn.Module], kind: type[_Native], settings: _Settings) -> nn.Module:
    made = _native_class(plain, kind, settings)
    new: nn.Module = made.__new__(made)
    return new


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


# ---- experiments

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


def _examine_norm(module: nn.Module) -> _Settings | None:
    weight = module._parameters.get("weight")
    if (
        weight is None
        or weight.dim() != 1
        or len(module._parameters) > 1
        or module._buffers
        or module._modules
        or not isinstance(_eps(module), float)
    ):
        return None
    normal, columns = _Random(), weight.shape[0]
    gain, x = normal(columns), normal(3, 1, columns)
    for offset, round_first in itertools.product((0.0, 1.0), (True, False)):

        def agrees(dtype: torch.dtype, offset: float = offset, first: bool = round_first) -> bool:
            probe, given = _stand_in(module, {"weight": gain.to(dtype)}), x.to(dtype)
            theirs = _outcome(lambda: type(module).forward(probe, given))
            ours = decode.rms_norm(given, gain.to(dtype), _eps(module), offset, first)
            # The reference does the same operations in the same order.
            return isinstance(theirs, Tensor) and torch.equal(ours, theirs)

        if agrees(torch.float32) and agrees(torch.bfloat16):
            return (("offset", offset), ("round_first", round_first))
    return None


def _examine_gate(module: nn.Module) -> _Settings | None:
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
        ours = run(_gated, tanh_gelu=tanh_gelu)
        if theirs is not None and ours is not None and _same(ours[0], theirs[0]):
            return (("tanh_gelu", tanh_gelu),)
    return None


def _examine_attention(module: nn.Module) -> _Settings | None:
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
        ours = None if theirs is None else _outcome(partial(run, _attention, **step))
        if ours is None or not all(map(_same, ours, theirs)):
            return None
    return ()


_EXAMINATIONS: dict[str, tuple[type[_Native], Callable[[nn.Module], _Settings | None]]] = {
    "norms": (_NativeNorm, _examine_norm),
    "gates": (_NativeGate, _examine_gate),
    "attentions": (_NativeAttention, _examine_attention),
}
