"""The only code that rounds activations: int8 or E4M3 codes with one scale for each token, or one for all.

    code = nearest(x / scale)          x ~ code * scale

int8: whole numbers from -127 to 127; E4M3: 8-bit floats up to 448 (`hfq.core.float8`). "dynamic": a token's scale is its
largest magnitude over the largest code, so that nothing is clipped. "static": one scale that calibration has found
(`fit_input_scale`); what lies beyond the largest code saturates. A token that holds NaN or infinity has the scale NaN,
so that all that is computed from it is NaN. Native kernels follow the rules to the bit (kernels/cpu/int8_body.h, kernels/cuda/tokens.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CalibrationError
from .float8 import E4M3, E4M3_MAX, e4m3_values, to_e4m3

__all__ = [
    "ACTIVATIONS",
    "check_input_scale",
    "fit_input_scale",
    "quantize_tokens",
    "rounded_tokens",
    "widest_input_scale",
]

ACTIVATIONS = ("dynamic", "static")

# The largest code.
_MOST = {torch.int8: 127.0, E4M3: E4M3_MAX}
# Below this the reciprocal of a scale overflows: what is that small counts as zero.
_LEAST = 1e-35

# Shares of the largest magnitude that are tried as the end of a static range, from 1 down to 0.13 in steps of 7 %.
_CLIPS = [0.93**step for step in range(29)]


def quantize_tokens(
    x: Tensor, input_scale: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations.

    Args:
        x: `[M, K]` of any float dtype; read as float32.
        input_scale: float32 `[1]` for all tokens, or None for one from each token's largest magnitude.
        dtype: of the codes, torch.int8 or `E4M3`.

    Returns:
        codes `[M, K]` and scales float32 `[M, 1]`.
    """
    x, most = x.float(), _MOST[dtype]
    largest = x.abs().amax(-1, keepdim=True)
    if input_scale is None:
        some = largest > _LEAST
        # Not of numbers and tensors: PyTorch makes products with the reciprocal of those, rounded twice (`largest / most`
        # on CUDA only).
        divisor = torch.full_like(largest, most)
        scales = torch.where(some, largest / divisor, 0.0)
        inverse = torch.where(some, divisor / largest, 0.0)
    else:
        usable = (input_scale > _LEAST) & input_scale.isfinite()
        scales = torch.where(usable, input_scale, torch.nan).expand_as(largest)
        inverse = torch.where(usable, 1 / input_scale, 0.0)
    # Infinity times zero and whatever comes of NaN: such tokens have no codes.
    steps = (x * inverse).clamp_(-most, most).nan_to_num_(0.0)
    codes = to_e4m3(steps) if dtype == E4M3 else steps.round_().to(torch.int8)
    return codes, torch.where(largest.isfinite(), scales, torch.nan)


def rounded_tokens(
    x: Tensor, input_scale: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> Tensor:
    """The activations that the codes stand for, float32 `[M, K]`; arguments as for `quantize_tokens`."""
    codes, scales = quantize_tokens(x, input_scale, dtype)
    return (e4m3_values(codes.view(torch.uint8)) if dtype == E4M3 else codes) * scales


def widest_input_scale(x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """The static scale that clips nothing of `[M, K]`, float32 `[1]`."""
    return (x.float().abs().amax() / _MOST[dtype]).view(1)


def fit_input_scale(
    sample: Tensor, weight: Tensor, rounded: Tensor, dtype: torch.dtype = torch.int8
) -> Tensor:
    """The static scale with the least squared error of a layer's output, float32 `[1]`.

    Clipping a few extreme activations buys finer steps for all others. The error is that of the product of quantized
    activations and quantized weight, beside the product of the float ones.

    Args:
        sample: `[S, K]`, what the layer reads; its largest magnitude is where the search begins.
        weight, rounded: float32 `[N, K]`, the weight and what its codes stand for; some of the rows will do.
        dtype: of the codes of activations.

    Raises:
        CalibrationError: the sample is empty, or holds NaN or infinity.
    """
    x = sample.float()
    widest = widest_input_scale(x, dtype) if x.numel() else x.new_tensor([torch.nan])
    if not bool(widest.isfinite()):
        raise CalibrationError(
            "the activations that this weight reads on the calibration data are NaN, infinite or missing: a static "
            "scale cannot be chosen; use activation='dynamic', or keep this module in float"
        )
    if not check_input_scale(widest):
        # Nothing ever arrives here: all scales are as good as each other.
        return torch.ones_like(widest)
    wanted = x @ weight.T
    best, least = widest, torch.inf
    for clip in _CLIPS:
        scale = (widest * clip).clamp(min=2 * _LEAST)
        error = float((rounded_tokens(x, scale, dtype) @ rounded.T - wanted).square().sum())
        if error < least:
            best, least = scale, error
    return best


def check_input_scale(scale: Tensor) -> bool:
    """Whether static scales are usable: finite and above 0."""
    return bool((scale.isfinite() & (scale > _LEAST)).all())
