"""Sixteen-value codebooks for weights that were divided by their group's largest magnitude.

nf4: "NormalFloat", the quantiles of a standard normal distribution, scaled to [-1, 1], with an exact zero
     (Dettmers et al., "QLoRA", 2023, appendix E). The values are the ones that every nf4 checkpoint uses.
fp4: E2M1, one sign, two exponent and one mantissa bit (OCP Microscaling Formats 1.0, section 5.3.3), divided by
     its largest value 6. Codes are in ascending order; zero has one code only, so the sixteenth repeats 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CODEBOOKS", "codebook"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (*(-value / 6 for value in reversed(_E2M1[1:])), *(value / 6 for value in _E2M1), 1.0),
}


def codebook(name: str, device: torch.device | str | None = None) -> Tensor:
    """The values of a codebook: float32 `[16]`, ascending, within [-1, 1]."""
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)
