"""What stands between the products of a decode step, one token per sequence, each in one call.

B sequences, H heads of D numbers that share H' heads of keys and values, T tokens seen. Float32, float16 or bfloat16, all operands alike:

    rms_norm   x [..., K], weight [K] -> [..., K]                             x / sqrt(mean(x^2) + eps), times weight + offset
    rotate     q [B, 1, H D], k [B, 1, H' D] -> [B, H, 1, D], [B, H', 1, D]   rotary embedding of halves (Su et al., 2021)
    append     k [B, H', 1, D], v [B, 1, H' D] into keys and values [B, H', C, D], at token `at`
    attend     q [B, H, 1, D], k and v [B, H', C, D] -> [B, 1, H D]           softmax(scale q k^T + mask) v over the first T of C
    gate       gate and up of one shape -> that shape                         silu(gate) * up, or tanh's gelu

PyTorch references, and native code for the CPU and for CUDA, whose `attend` wants D to be a multiple of 16 (on CUDA at most 256, in 16 bits).
`append` is PyTorch's on CUDA. What products give need only be contiguous in its last dimension. No gradients. `rms_norm`, `rotate` and `gate`
round to the dtype where the code of Transformers does; sums are float32 in another order, so last bits may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .ops import LIBRARY

__all__ = ["append", "attend", "gate", "rms_norm", "rotate"]

for _schema in (
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool round_first) -> Tensor",
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    "append(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, int at) -> ()",
    "attend(Tensor q, Tensor k, Tensor v, int length, Tensor? mask, float scale) -> Tensor",
    "gate(Tensor gate, Tensor up, bool tanh_gelu) -> Tensor",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich, 2019) of the last dimension.

    Args:
        offset: added to the weight.
        round_first: the normalised x is rounded to its dtype before the weight comes in.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype).float()
    return (normed * (weight.float() + offset)).to(x.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair (x[i], x[i + D / 2]) of a head turned by an angle; cos and sin `[B or 1, 1, D]`."""
    size = cos.shape[-1]

    def turned(x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], -1, 1, size)
        first, second = heads.chunk(2, dim=-1)
        return heads * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    return turned(q), turned(k)


def append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: int) -> None:
    """One token's keys and values to the others'."""
    keys[:, :, at] = k.squeeze(2)
    values[:, :, at] = v.view_as(k).squeeze(2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, length: int, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of one query per sequence to the first `length` tokens. A query that sees nothing gives 0.

    Args:
        mask: `[B or 1, H or 1, 1, T]`; bool, true where a token is seen, or numbers that are added to the scores.
    """
    k, v = k[:, :, :length], v[:, :, :length]
    y = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def gate(gate: Tensor, up: Tensor, tanh_gelu: bool) -> Tensor:
    """A gated activation (Shazeer, 2020)."""
    return (functional.gelu(gate, approximate="tanh") if tanh_gelu else functional.silu(gate)) * up


for _function in (rms_norm, rotate, append, attend, gate):
    LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")


def _fake_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    size = cos.shape[-1]
    return (
        q.new_empty((q.shape[0], q.shape[-1] // size, 1, size)),
        k.new_empty((k.shape[0], k.shape[-1] // size, 1, size)),
    )


def _fake_attend(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1] * q.shape[3]))


torch.library.register_fake("hfq::rms_norm", lambda x, *_: torch.empty_like(x), lib=LIBRARY)
torch.library.register_fake("hfq::rotate", _fake_rotate, lib=LIBRARY)
torch.library.register_fake("hfq::append", lambda *_: None, lib=LIBRARY)
torch.library.register_fake("hfq::attend", _fake_attend, lib=LIBRARY)
torch.library.register_fake("hfq::gate", lambda gate, *_: torch.empty_like(gate), lib=LIBRARY)
