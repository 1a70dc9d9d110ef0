"""The only code that rounds weights to a grid.

Algorithms choose scales, zero points and (from part two on) the order and the targets of rounding; the steps
"store the scales in their dtype" and "round to the nearest code of the *stored* grid" are here, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codebooks import codebook
from .errors import ConfigError, WeightError
from .spec import SCALE_BLOCK, CodebookSpec, QuantSpec, group_count
from .weight import QuantizedWeight, ScaleCodes, expand_groups

__all__ = ["decode_scales", "encode", "group_columns", "range_grid", "round_to_grid"]


def group_columns(weight: Tensor, group_size: int) -> Tensor:
    """View `[N, K]` as groups `[N, G, group_size]`; a short last group repeats its last column.

    Repeating a value changes neither the minimum nor the maximum of the group.
    """
    rows, columns = weight.shape
    if group_count(columns, group_size) == 1:
        return weight.unsqueeze(1)
    missing = -columns % group_size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], dim=1)
    return weight.unflatten(1, (-1, group_size))


def range_grid(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that just cover each group's range.

    Args:
        weight: float32 `[N, K]`.

    Returns:
        (scales, zeros), float32 `[N, G]`; zeros is None for symmetric grids and codebooks.

        - codebook: the largest magnitude.
        - symmetric: the codes reach one step further down than up (-8 to 7 at 4 bits), so the scale takes the
          sign that puts the group's extreme value on the longer side; nothing is clipped.
        - asymmetric: from min(w, 0) to max(w, 0), with an integer zero point, so that 0 stays exactly 0.
    """
    groups = group_columns(weight, spec.group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    if isinstance(spec, CodebookSpec):
        return torch.maximum(high, -low), None
    if spec.sym:
        extreme = torch.where(-low >= high, low, high)
        return extreme / -spec.implied_zero, None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low) / (spec.levels - 1)
    zeros = torch.round(-low * _reciprocal(scales))
    return scales, zeros


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> QuantizedWeight:
    """Store the grid, then round the weight to it.

    Args:
        weight: float32 `[N, K]`.
        scales, zeros: float32 `[N, G]`, zeros None exactly where ``spec.sym``.

    Raises:
        WeightError: the weight holds NaN or infinite values.
        ConfigError: a scale does not fit ``spec.scale_dtype``.
    """
    stored, scale_codes = _store_scales(scales, spec)
    stored_zeros = None if zeros is None else zeros.to(spec.torch_scale_dtype)
    codes = round_to_grid(weight, stored.float(), None if stored_zeros is None else stored_zeros.float(), spec)
    return QuantizedWeight(spec=spec, codes=codes, scales=stored, zeros=stored_zeros, scale_codes=scale_codes)


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """The nearest code of each weight: uint8 `[N, K]`. All inputs float32, scales and zeros `[N, G]`.

    A group whose scale is 0 gets the code of 0.
    """
    columns = weight.shape[1]
    scaled = weight * expand_groups(_reciprocal(scales), spec.group_size, columns)
    if isinstance(spec, CodebookSpec):
        values = codebook(spec.codebook, weight.device)
        return torch.bucketize(scaled, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    zero = spec.implied_zero if zeros is None else expand_groups(zeros, spec.group_size, columns)
    return scaled.add_(zero).round_().clamp_(0, spec.levels - 1).to(torch.uint8)


def _store_scales(scales: Tensor, spec: QuantSpec) -> tuple[Tensor, ScaleCodes | None]:
    """Scales as they will be read back: in their dtype, or through 8-bit codes."""
    # A NaN or infinite weight always shows in its group's scale: minimum and maximum propagate both.
    if not torch.isfinite(scales).all():
        raise WeightError(
            "expected finite weights, got NaN or infinity: the checkpoint is damaged or was saved from a "
            "diverged run; repair it, or keep this module in float with overrides={r'<its name>': None}"
        )
    if isinstance(spec, CodebookSpec) and spec.double_quant:
        return _double_quantize(scales, spec)
    stored = scales.to(spec.torch_scale_dtype)
    if not torch.isfinite(stored).all():
        raise ConfigError(
            f"a scale of {scales.abs().max().item():.3g} does not fit scale_dtype={spec.scale_dtype!r}; "
            "use scale_dtype='float32'"
        )
    return stored, None


def _double_quantize(scales: Tensor, spec: CodebookSpec) -> tuple[Tensor, ScaleCodes]:
    """8-bit affine codes of the scales, per block of `SCALE_BLOCK` (QLoRA, section 3, with a min-max grid)."""
    flat = scales.flatten()
    blocks = group_columns(flat.unsqueeze(0), SCALE_BLOCK)[0]
    offset = blocks.amin(-1)
    step = (blocks.amax(-1) - offset) / 255
    codes = ((blocks - offset[:, None]) * _reciprocal(step)[:, None]).round_().clamp_(0, 255).to(torch.uint8)
    scale_codes = ScaleCodes(
        codes=codes.flatten()[: flat.numel()].view(scales.shape), step=step.float(), offset=offset.float()
    )
    return decode_scales(scale_codes, spec.torch_scale_dtype), scale_codes


def decode_scales(stored: ScaleCodes, dtype: torch.dtype) -> Tensor:
    """The scales `[N, G]` behind 8-bit codes, rounded to `dtype` so that every reader sees the same values."""
    flat = stored.codes.flatten()
    block = torch.arange(flat.numel(), device=flat.device) // SCALE_BLOCK
    return (stored.offset[block] + flat.float() * stored.step[block]).to(dtype).view(stored.codes.shape)


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)


