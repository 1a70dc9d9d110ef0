"""E4M3, the 8-bit float of weights and activations (Open Compute Project, "OCP 8-bit Floating Point Specification", 1.0).

    | s | e e e e | m m m |      (-1)^s * 2^(e - 7) * (1 + m / 8)      e from 1 to 15
      7   6     3   2   0        (-1)^s * 2^-6      * (m / 8)          e = 0

There are no infinities: s 1111 111 is NaN, and the largest magnitude is 2^8 * 1.75 = 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["E4M3", "E4M3_MAX", "e4m3_table", "e4m3_values", "has_nan", "to_e4m3"]

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

_NAN = 0x7F


def to_e4m3(values: Tensor) -> Tensor:
    """The nearest E4M3 of each value, ties to even: float32 -> `E4M3`. What is too large becomes 448; NaN stays NaN."""
    # Whether a cast saturates depends on the release of PyTorch and on the device.
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def e4m3_values(codes: Tensor) -> Tensor:
    """The numbers behind the bytes of E4M3: uint8 -> float32."""
    if codes.device.type != "cpu":
        return codes.view(E4M3).float()
    # PyTorch's cast takes ten times as long on the CPU. With sign, exponent and mantissa moved to their places in a
    # float16, whose exponents are counted from 15 instead of 7, the byte reads as 1/256 of its value, subnormals too.
    moved = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    # The sign was extended to bits 15 and 14.
    moved = moved.bitwise_and_(~(1 << 14))
    # One more than a NaN's exponent and mantissa would reach bit 14, which makes it a NaN of float16.
    moved |= (moved + (1 << 7)).bitwise_and_(1 << 14)
    return moved.view(torch.float16).float().mul_(256)


def e4m3_table(device: torch.device | str | None = None) -> Tensor:
    """The numbers behind all bytes, as a codebook of 8 bits: float32 `[256]`."""
    return e4m3_values(torch.arange(256, dtype=torch.uint8)).to(device)


def has_nan(codes: Tensor) -> bool:
    """Whether any byte is a NaN."""
    return codes.numel() > 0 and bool((codes & _NAN).max() == _NAN)
