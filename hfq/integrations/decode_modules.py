"""Modules whose forward may be native code: a norm, a gated MLP and attention, for one token in one call.

What native code does not know goes to the forward of the model's own class, which each of them is a subclass of: gradients, compilers,
several tokens at a time, another attention implementation. That both compute the same is found out in `decode_experiments.py`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels import (
    decode,  # noqa: F401 (defines the operators)
    native,
)
from ..kernels.cuda import no_native_code
from ..nn.linear import products
from . import growing_cache

__all__ = [
    "Native",
    "NativeAttention",
    "NativeGate",
    "NativeNorm",
    "Settings",
    "epsilon",
    "native_attention",
    "native_class",
    "native_gate",
    "native_norm",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# kernels/cuda/decode.h
_MOST_ATTENDED_BYTES = 512

# Class attributes of a mixin below, which tell what its plain class computes.
Settings = tuple[tuple[str, Any], ...]


class Native(nn.Module):
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


_CLASSES: dict[Any, Any] = {}


def native_class(plain: type[nn.Module], kind: type[Native], settings: Settings) -> Any:
    """A subclass under the same name: what looks for a class by its name finds it."""
    made_of = (plain, kind, settings)
    if made_of not in _CLASSES:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        own = {"plain": plain, "made_of": made_of, **dict(settings)}
        _CLASSES[made_of] = type(plain.__name__, (kind, plain), names | own)
    return _CLASSES[made_of]


def _new(plain: type[nn.Module], kind: type[Native], settings: Settings) -> nn.Module:
    made = native_class(plain, kind, settings)
    new: nn.Module = made.__new__(made)
    return new


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


class NativeNorm(Native):
    """Attributes:
    offset, round_first: as in `hfq.kernels.decode.rms_norm`.
    """

    offset: ClassVar[float]
    round_first: ClassVar[bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _applies(self, args[0]):
            x, weight = args[0], self._parameters["weight"]
            if weight is not None and weight.dtype == x.dtype and weight.device == x.device:
                return native_norm(self, x, weight)
        return super().forward(*args, **kwargs)


def native_norm(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """x `[..., K]` -> `[..., K]`, contiguous."""
    settings = (epsilon(module), module.offset, module.round_first)
    y: Tensor = torch.ops.hfq.rms_norm.default(x.contiguous(), weight, *settings)
    return y


def epsilon(module: Any) -> Any:
    """Of a norm, under either of the names that Transformers has for it; None where there is none."""
    attributes = module.__dict__
    return attributes.get("variance_epsilon", attributes.get("eps"))


class NativeGate(Native):
    """Attributes:
    tanh_gelu: as in `hfq.kernels.decode.gate`.
    """

    tanh_gelu: ClassVar[bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _applies(self, args[0]):
            return native_gate(self, args[0])
        return super().forward(*args, **kwargs)


def native_gate(module: Any, x: Tensor) -> Any:
    """What the module's projection down gives for x `[..., K]`."""
    modules = module._modules
    gate, up = products((modules["gate_proj"], modules["up_proj"]), x)
    gated = torch.ops.hfq.gate.default(gate, up, module.tanh_gelu)
    return products((modules["down_proj"],), gated)[0]


class NativeAttention(Native):
    """Rotary embeddings, and norms of q and k where there are some; one token per sequence."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and _attends(self, **kwargs):
            return native_attention(self, **kwargs)
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
        # Fewer columns turn a part of each head only.
        and position_embeddings[0].shape[-1] == module.head_dim
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


def native_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any,
    attention_mask: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Hidden states `[B, 1, K]` -> `[B, 1, K]`, and no attention weights; the token is added to the cache `past_key_values`."""
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
