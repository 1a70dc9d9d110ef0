"""Scales and zero points that are quantized themselves, per block of neighbouring rows (SpQR, section 4.2).

Grids of groups as small as 16 columns would cost a bit or two per weight in float16. Neighbouring rows have similar
ones in the same columns: so each gets a code of a few bits, and a block of rows shares a step and an offset for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError
from .spec import SpqrSpec
from .weight import ScaleCodes

__all__ = ["decode_bilevel", "encode_bilevel"]

# Fractions of a block's range to start from, and turns of nearest codes and least squares line after each.
_SHRINKS = (1.0, 0.8, 0.6)
_TURNS = 5


def encode_bilevel(values: Tensor, spec: SpqrSpec, importance: Tensor | None = None) -> ScaleCodes:
    """Codes, steps and offsets with a small weighted squared error, no larger than those that span the range.

    Args:
        values: float32 `[N, G]`.
        importance: float32 `[N, G]`, at least 0: what an error of 1 costs. None: all the same.

    Raises:
        ConfigError: a step or an offset does not fit ``spec.scale_dtype``.
    """
    rows = values.shape[0]
    blocks = _in_blocks(values, spec)
    costs = torch.ones_like(values) if importance is None else importance
    # So that blocks in which nothing counts get a line through their values, too.
    costs = costs + torch.finfo(torch.float32).tiny
    costs = _in_blocks(costs, spec)
    if rows % spec.stat_group_size:
        costs[-1, rows % spec.stat_group_size :] = 0
    most = (1 << spec.stat_bits) - 1
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    step = offset = codes = torch.zeros_like(low)
    for shrink in _SHRINKS:
        a_step = (high - low) * (shrink / most)
        an_offset = (low + high) / 2 - a_step * (most / 2)
        for _ in range(_TURNS):
            a_step, an_offset = _stored(a_step, spec), _stored(an_offset, spec)
            found = ((blocks - an_offset) / a_step).nan_to_num_(0).round_().clamp_(0, most)
            error = (costs * (an_offset + found * a_step - blocks).square_()).sum(1, keepdim=True)
            better = error < least
            step, offset = (
                torch.where(better, a_step, step),
                torch.where(better, an_offset, offset),
            )
            codes, least = torch.where(better, found, codes), torch.where(better, error, least)
            a_step, an_offset = _line(blocks, found, costs, a_step, an_offset)
    if not bool(least.isfinite().all()):
        raise ConfigError(
            f"a scale or zero point of {values.abs().max().item():.3g} does not fit scale_dtype={spec.scale_dtype!r}; "
            "use scale_dtype='float32'"
        )
    return ScaleCodes(
        codes=codes.to(torch.uint8).flatten(0, 1)[:rows].contiguous(),
        step=step.squeeze(1).to(spec.torch_stat_dtype),
        offset=offset.squeeze(1).to(spec.torch_stat_dtype),
    )


def decode_bilevel(stored: ScaleCodes, stat_group_size: int) -> Tensor:
    """The scales or zero points behind codes: float32 `[..., N, G]`."""
    rows = stored.codes.shape[-2]
    step, offset = (
        each.float().repeat_interleave(stat_group_size, -2)[..., :rows, :]
        for each in (stored.step, stored.offset)
    )
    return offset + stored.codes.float() * step


def _in_blocks(values: Tensor, spec: SpqrSpec) -> Tensor:
    """`[N, G]` -> `[R, stat_group_size, G]`; a short last block repeats its last row."""
    missing = -values.shape[0] % spec.stat_group_size
    if missing:
        values = torch.cat([values, values[-1:].expand(missing, -1)])
    return values.reshape(-1, spec.stat_group_size, values.shape[1]).clone()


def _stored(values: Tensor, spec: SpqrSpec) -> Tensor:
    return values.to(spec.torch_stat_dtype).float()


def _line(
    blocks: Tensor, codes: Tensor, costs: Tensor, step: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Step and offset of the weighted least squares line of values over codes; the old ones where there is none."""
    total = costs.sum(1, keepdim=True)
    x, y = ((costs * each).sum(1, keepdim=True) / total for each in (codes, blocks))
    centred = codes - x
    slope = (costs * centred * blocks).sum(1, keepdim=True) / (costs * centred.square()).sum(
        1, keepdim=True
    )
    usable = slope.isfinite() & (slope >= 0)
    return torch.where(usable, slope, step), torch.where(usable, y - slope * x, offset)
