"""The only code that rounds weights to a grid.

Algorithms choose scales, zero points and the order and targets of rounding; the steps "store the scales in
their dtype" and "round to the nearest code of the *stored* grid" are here, once.

What reads the whole weight are operators, which CUDA has kernels for (`hfq.kernels.cuda_packing_ops`); for any float dtype:

    hfq::group_range(weight [N, K], group_size) -> float32 [N, G], float32 [N, G]
    hfq::nearest_codes(weight [N, K], scales [N, G], zeros? [N, G], codebook? [16], bits, group_size) -> uint8 [N, K]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .bilevel import decode_bilevel, encode_bilevel
from .codebooks import codebook
from .errors import ConfigError, WeightError
from .float8 import E4M3_MAX, to_e4m3
from .outliers import collect_outliers, largest_of_pieces
from .spec import SCALE_BLOCK, CodebookSpec, Fp8Spec, QuantSpec, SpqrSpec, group_count
from .weight import QuantizedWeight, ScaleCodes

__all__ = [
    "StoredGrid",
    "bilevel_grid",
    "check_finite",
    "codebook_of",
    "column_rounder",
    "decode_scales",
    "encode",
    "grid_points",
    "group_columns",
    "group_mean",
    "group_range",
    "join_grids",
    "nearest_codes",
    "range_grid",
    "residual",
    "round_to_grid",
    "rounded_away",
    "store_grid",
    "stored_scales",
]


_LIBRARY: Any = torch.library.Library("hfq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("group_range(Tensor weight, int group_size) -> (Tensor, Tensor)")
_LIBRARY.define(
    "nearest_codes(Tensor weight, Tensor scales, Tensor? zeros, Tensor? codebook, int bits, int group_size) -> Tensor"
)


def group_columns(weight: Tensor, group_size: int) -> Tensor:
    """View `[N, K]` as groups `[N, G, S]`; a short last group repeats its last column.

    Repeating a value changes neither the minimum nor the maximum of the group. For sums see `group_mean`.
    """
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    if groups == 1:
        return weight.unsqueeze(1)
    missing = groups * group_size - columns
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], dim=1)
    return weight.reshape(rows, groups, group_size)


def group_mean(groups: Tensor, columns: int) -> Tensor:
    """Mean of each group of `group_columns`, `[N, G, S]` -> `[N, G]`, without the repeated columns.

    Args:
        columns: K, columns of the weight before it was cut into groups.
    """
    mean = groups.mean(-1)
    last = columns - (groups.shape[1] - 1) * groups.shape[2]
    if last < groups.shape[2]:
        mean[:, -1] = groups[:, -1, :last].mean(-1)
    return mean


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group, float32 `[N, G]`; NaN where a group has one."""
    groups = group_columns(weight, group_size)
    return groups.amin(-1).float(), groups.amax(-1).float()


_LIBRARY.impl("group_range", group_range, "CompositeExplicitAutograd")


def range_grid(
    weight: Tensor, spec: QuantSpec, *, integer_zeros: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that just cover each group's range.

    Args:
        weight: `[N, K]` of any float dtype.
        integer_zeros: round zero points. Without, both ends of the range are exact, but 0 is not.

    Returns:
        (scales, zeros), float32 `[N, G]`; zeros is None for symmetric grids and codebooks.

        - codebook: the largest magnitude.
        - 8-bit floats: the largest magnitude becomes the largest of them, 448.
        - symmetric: the codes reach one step further down than up (-8 to 7 at 4 bits), so the scale takes the
          sign that puts the group's extreme value on the longer side. A value of almost that size on the other
          side loses up to one step; a longer scale would cost all values of the group more.
        - asymmetric: from min(w, 0) to max(w, 0); with an integer zero point 0 stays exactly 0.
    """
    low, high = torch.ops.hfq.group_range(weight.detach(), spec.group_size)
    if isinstance(spec, CodebookSpec):
        return torch.maximum(high, -low), None
    if isinstance(spec, Fp8Spec):
        largest = torch.maximum(high, -low)
        # Not `largest / E4M3_MAX`: on CUDA that is a product with the reciprocal, rounded twice.
        return largest / torch.full_like(largest, E4M3_MAX), None
    if spec.sym:
        extreme = torch.where(-low >= high, low, high)
        return extreme / -spec.implied_zero, None
    low, high = low.clamp(max=0), high.clamp(min=0)
    # The difference of the two could overflow where the scale does not.
    scales = high / (spec.levels - 1) - low / (spec.levels - 1)
    zeros = -low * _reciprocal(stored_scales(scales, spec).float())
    return scales, zeros.round_() if integer_zeros else zeros


def stored_scales(scales: Tensor, spec: QuantSpec) -> Tensor:
    """Scales in ``spec.scale_dtype``, rounded away from zero, so that a grid reaches as far as it was meant to.

    This matters most for scales too small for a normal number of that dtype: to nearest, they would lose up to
    all of their bits. Scales that the dtype holds exactly stay as they are; too large ones become infinite.
    """
    return rounded_away(scales, spec.torch_scale_dtype)


def rounded_away(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype, away from zero; see `stored_scales`."""
    stored = scales.to(dtype)
    if stored.dtype == torch.float32:
        return stored
    # In IEEE formats the next larger magnitude is the next larger integer, whatever the sign.
    next_larger = (stored.view(torch.int16) + 1).view(stored.dtype)
    return torch.where(stored.float().abs() < scales.abs(), next_larger, stored)


def encode(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec
) -> QuantizedWeight:
    """Store the grid, then round the weight to it. Where outliers are stored, they are the largest errors.

    Args:
        weight: `[N, K]` of any float dtype.
        scales, zeros: float32 `[N, G]`, zeros None exactly where ``spec.sym``.

    Raises:
        WeightError: the weight holds NaN or infinite values.
        ConfigError: a scale does not fit ``spec.scale_dtype``.
    """
    check_finite(weight)
    grid = store_grid(scales, zeros, spec)
    codes = round_to_grid(weight, grid.scales.float(), grid.float_zeros, spec)
    quantized = grid.weight(codes, spec)
    if not isinstance(spec, SpqrSpec):
        return quantized
    errors = weight - quantized.dequantize()
    chosen = largest_of_pieces(errors.abs(), spec)
    return replace(quantized, outliers=collect_outliers(chosen, errors, spec))


def check_finite(weight: Tensor) -> None:
    """`WeightError` where a weight holds NaN or infinite values."""
    if not _is_finite(weight):
        raise WeightError(
            "expected finite weights, got NaN or infinity: the checkpoint is damaged or was saved from a "
            "diverged run; repair it, or keep this module in float with overrides={r'<its name>': None}"
        )


@dataclass(frozen=True, kw_only=True)
class StoredGrid:
    """The grid of a weight as it will be read back.

    Attributes:
        scales: `[N, G]` in ``spec.scale_dtype``.
        zeros: likewise, or None.
        scale_codes, zero_codes: see `QuantizedWeight`.
    """

    scales: Tensor
    zeros: Tensor | None
    scale_codes: ScaleCodes | None = None
    zero_codes: ScaleCodes | None = None

    @property
    def float_zeros(self) -> Tensor | None:
        return None if self.zeros is None else self.zeros.float()

    def weight(self, codes: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """The codes uint8 `[N, K]` on this grid."""
        return QuantizedWeight(
            spec=spec,
            codes=codes,
            scales=self.scales,
            zeros=self.zeros,
            scale_codes=self.scale_codes,
            zero_codes=self.zero_codes,
        )


def store_grid(scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> StoredGrid:
    """Round a grid, float32 `[N, G]`, to what will be stored.

    Raises:
        ConfigError: a scale does not fit ``spec.scale_dtype``.
    """
    if isinstance(spec, SpqrSpec):
        assert zeros is not None
        # An error of a zero point shifts the weights by as many steps.
        return bilevel_grid(
            encode_bilevel(scales, spec), encode_bilevel(zeros, spec, scales.square()), spec
        )
    stored, scale_codes = _store(scales, spec)
    stored_zeros = None if zeros is None else zeros.to(spec.torch_scale_dtype)
    return StoredGrid(scales=stored, zeros=stored_zeros, scale_codes=scale_codes)


def bilevel_grid(scale_codes: ScaleCodes, zero_codes: ScaleCodes, spec: SpqrSpec) -> StoredGrid:
    """The grid behind codes of scales and zero points."""
    return StoredGrid(
        scales=decode_bilevel(scale_codes, spec.stat_group_size),
        zeros=decode_bilevel(zero_codes, spec.stat_group_size),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
    )


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """The nearest code of each weight: uint8 `[N, K]`.

    A group whose scale is 0 gets the code of 0.

    Args:
        weight: `[N, K]` of any float dtype.
        scales, zeros: float32 `[N, G]`.
    """
    if isinstance(spec, Fp8Spec):
        scaled = _in_steps(group_columns(weight, spec.group_size), scales)
        return _columns(to_e4m3(scaled).view(torch.uint8), weight)
    points = codebook_of(spec, weight.device)
    codes: Tensor = torch.ops.hfq.nearest_codes(
        weight.detach(), scales, zeros, points, spec.bits, spec.group_size
    )
    return codes


def nearest_codes(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    points: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """`round_to_grid` for integers and codebooks."""
    scaled = _in_steps(group_columns(weight, group_size), scales)
    return _columns(_nearest(scaled, zeros, points, bits).to(torch.uint8), weight)


_LIBRARY.impl("nearest_codes", nearest_codes, "CompositeExplicitAutograd")


def _columns(codes: Tensor, weight: Tensor) -> Tensor:
    """Codes of groups, without those of repeated columns."""
    return codes.flatten(1)[:, : weight.shape[1]].contiguous()


def join_grids(grids: Sequence[StoredGrid]) -> StoredGrid:
    """The grids of neighbouring groups of columns as one. None of them is quantized itself."""
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return StoredGrid(
        scales=torch.cat([grid.scales for grid in grids], dim=1),
        zeros=torch.cat(zeros, dim=1) if zeros else None,
    )


def column_rounder(
    scales: Tensor, zeros: Tensor | None, points: Tensor | None, bits: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Rounds one column of a weight after the other, for methods that correct what is still to be rounded.

    Args:
        scales, zeros: of the column's group as stored, float32 `[N]`; no zeros where the grid is symmetric.
        points: the values of a codebook, float32 `[16]`, or None.

    Returns:
        A function from float32 `[N]` to (codes, rounded values): whole float32 or uint8, and float32, both `[N]`.
    """
    inverse = _reciprocal(scales)
    if points is not None:
        boundaries = (points[1:] + points[:-1]) / 2

        def round_to_codebook(column: Tensor) -> tuple[Tensor, Tensor]:
            codes = torch.bucketize(column * inverse, boundaries)
            return codes, points[codes] * scales

        return round_to_codebook
    zero = 1 << (bits - 1) if zeros is None else zeros
    most = (1 << bits) - 1

    def round_to_integers(column: Tensor) -> tuple[Tensor, Tensor]:
        codes = (column * inverse).add_(zero).round_().clamp_(0, most)
        return codes, (codes - zero) * scales

    return round_to_integers


def residual(groups: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """Weight minus rounded weight, in units of the scale: `[N, G, S]`.

    Args:
        groups: float32 `[N, G, S]`, see `group_columns`.
        scales, zeros: float32 `[N, G]`, as they would be stored.
    """
    points = grid_points(groups, scales, zeros, codebook_of(spec, groups.device), spec.bits)
    return _in_steps(groups, scales).sub_(points)


def codebook_of(spec: QuantSpec, device: torch.device) -> Tensor | None:
    """The values that codes stand for, float32 `[16]`; None where they are numbers themselves.

    8-bit floats are neither: `round_to_grid` alone knows them.
    """
    assert not isinstance(spec, Fp8Spec)
    return codebook(spec.codebook, device) if isinstance(spec, CodebookSpec) else None


def grid_points(
    groups: Tensor, scales: Tensor, zeros: Tensor | None, points: Tensor | None, bits: int
) -> Tensor:
    """The rounded weight in units of the scale: `[N, G, S]`, float32.

    Args:
        groups, scales, zeros: as for `residual`.
        points: the values of a codebook, float32 `[16]`, or None.
    """
    nearest = _nearest(_in_steps(groups, scales), zeros, points, bits)
    return nearest.sub_(_zero(zeros, bits)) if points is None else points[nearest.int()]


def _in_steps(groups: Tensor, scales: Tensor) -> Tensor:
    """Weights `[N, G, S]` in units of their scale."""
    return groups * _reciprocal(scales).unsqueeze(-1)


def _nearest(scaled: Tensor, zeros: Tensor | None, points: Tensor | None, bits: int) -> Tensor:
    """The nearest code of ``weight / scale``, `[N, G, S]`: uint8 for codebooks, whole float32, in the memory of `scaled`, for
    integers.
    """
    if points is not None:
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        # Fifteen comparisons take half the time of a binary search.
        for boundary in (points[1:] + points[:-1]) / 2:
            codes += scaled > boundary
        return codes
    return scaled.add_(_zero(zeros, bits)).round_().clamp_(0, (1 << bits) - 1)


def _zero(zeros: Tensor | None, bits: int) -> Tensor | int:
    """What stands at 0, ready to be added to `[N, G, S]`."""
    return 1 << (bits - 1) if zeros is None else zeros.unsqueeze(-1)


def _store(scales: Tensor, spec: QuantSpec) -> tuple[Tensor, ScaleCodes | None]:
    """Scales as they will be read back: in their dtype, or through 8-bit codes."""
    if isinstance(spec, CodebookSpec) and spec.double_quant:
        scale_codes = _double_quantize(scales)
        stored = decode_scales(scale_codes, spec.torch_scale_dtype)
    else:
        scale_codes, stored = None, stored_scales(scales, spec)
    if not _is_finite(stored):
        raise ConfigError(
            f"a scale of {scales.abs().max().item():.3g} does not fit scale_dtype={spec.scale_dtype!r}; "
            "use scale_dtype='float32'"
        )
    return stored, scale_codes


def _double_quantize(scales: Tensor) -> ScaleCodes:
    """8-bit affine codes of the scales, per block of `SCALE_BLOCK` (QLoRA, section 3, with a min-max grid)."""
    flat = scales.flatten()
    blocks = group_columns(flat.unsqueeze(0), SCALE_BLOCK)[0]
    offset = blocks.amin(-1)
    step = (blocks.amax(-1) - offset) / 255
    codes = ((blocks - offset[:, None]) * _reciprocal(step)[:, None]).round_().clamp_(0, 255)
    codes = codes.to(torch.uint8).flatten()[: flat.numel()].view(scales.shape)
    return ScaleCodes(codes=codes, step=step, offset=offset)


def decode_scales(stored: ScaleCodes, dtype: torch.dtype) -> Tensor:
    """The scales behind 8-bit codes, rounded to `dtype` so that every reader sees the same values.

    A stack of weights (codes `[E, N, G]`, step and offset `[E, B]`) is decoded in one go.
    """
    flat = stored.codes.flatten(-2)
    count = flat.shape[-1]
    step = stored.step.repeat_interleave(SCALE_BLOCK, -1)[..., :count]
    offset = stored.offset.repeat_interleave(SCALE_BLOCK, -1)[..., :count]
    return (offset + flat.float() * step).to(dtype).view(stored.codes.shape)


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or so small that its reciprocal overflows."""
    inverse = 1 / scales
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


def _is_finite(values: Tensor) -> bool:
    # Both extremes are NaN where any value is; one pass, 20 times faster than isfinite().all(). They are fetched
    # together: on a GPU each answer is waited for.
    return values.numel() == 0 or all(map(math.isfinite, torch.stack(values.aminmax()).tolist()))
