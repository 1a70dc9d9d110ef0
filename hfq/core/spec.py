"""What is stored for one weight matrix, never how it is computed or laid out.

W is `[N, K]` = `[out_features, in_features]`. Each row is cut into groups of `group_size` neighbouring columns
(the last one may be shorter); a group has one scale and, where it is asymmetric, one zero point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .activations import ACTIVATIONS
from .checks import check_flag
from .codebooks import CODEBOOKS
from .errors import ConfigError, nearest
from .float8 import E4M3

__all__ = [
    "SCALE_BLOCK",
    "CodebookSpec",
    "Fp8Spec",
    "Int8Spec",
    "IntSpec",
    "QuantSpec",
    "SpqrSpec",
    "activation_dtype",
    "columns_per_group",
    "group_count",
    "outlier_count",
    "with_float_activations",
]

_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Scales of a double-quantized codebook are 8-bit codes in blocks of this many (QLoRA, section 3).
SCALE_BLOCK = 256


def columns_per_group(in_features: int, group_size: int) -> int:
    """Columns from one group of a row to the next, at least 1; `group_size` -1 is one group."""
    return max(1, in_features) if group_size == -1 else group_size


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups in a row of `in_features` columns; `group_size` -1 is one group."""
    return 1 if group_size == -1 else -(-in_features // group_size)


@dataclass(frozen=True, kw_only=True)
class IntSpec:
    """A uniform grid: ``w = (code - zero) * scale`` with unsigned codes below ``2**bits``.

    Attributes:
        bits: 2 to 8.
        group_size: columns that share a scale; -1 for the whole row.
        sym: True fixes the zero point at ``2**(bits-1)`` and stores none. False stores one per group, as a
            float, so that it may be fractional (HQQ).
        scale_dtype: dtype of scales and zero points, "float16", "bfloat16" or "float32".
        static_groups: groups are runs of neighbours. False: each column has the number of its group stored.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    scale_dtype: str = "float16"
    static_groups: bool = True

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        check_flag("sym", self.sym)
        check_flag("static_groups", self.static_groups)
        _check_group_size(self.group_size)
        _check_scale_dtype(self.scale_dtype)

    @property
    def activation(self) -> str | None:
        """How activations are quantized; None: they are not. See `Int8Spec`."""
        return None

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def implied_zero(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale_dtype]


@dataclass(frozen=True, kw_only=True)
class Int8Spec(IntSpec):
    """8 bits per output channel, symmetric, float32 scales; with `activation` W8A8, computed in integers.

    Attributes:
        activation: None for float activations, "dynamic" for int8 with a scale from each token, "static" for int8 with
            one calibrated scale, which is stored (`hfq.core.activations`).
    """

    bits: int = 8
    group_size: int = -1
    sym: bool = True
    scale_dtype: str = "float32"
    activation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bits, self.group_size, self.sym, self.scale_dtype) != (8, -1, True, "float32"):
            raise ConfigError(
                "format 'int8' stores symmetric 8-bit codes per output channel with float32 scales, got "
                f"bits={self.bits}, group_size={self.group_size}, sym={self.sym}, "
                f"scale_dtype={self.scale_dtype!r}; use format 'int' for other settings"
            )
        _check_activation(self.activation)


@dataclass(frozen=True, kw_only=True)
class Fp8Spec:
    """8-bit floats (E4M3) with one float32 scale per output channel: ``w = value(code) * scale``.

    Attributes:
        activation: None for float activations, "dynamic" for E4M3 with a scale from each token, "static" for E4M3 with
            one calibrated scale, which is stored (`hfq.core.activations`).
    """

    activation: str | None = None
    bits: ClassVar[int] = 8
    group_size: ClassVar[int] = -1
    sym: ClassVar[bool] = True
    scale_dtype: ClassVar[str] = "float32"
    static_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_activation(self.activation)

    @property
    def levels(self) -> int:
        return 256

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return torch.float32


@dataclass(frozen=True, kw_only=True)
class CodebookSpec:
    """A non-uniform grid: ``w = codebook[code] * scale`` with 4-bit codes.

    Attributes:
        codebook: a name in `hfq.core.codebooks.CODEBOOKS`.
        group_size: columns that share a scale; -1 for the whole row.
        double_quant: store the scales themselves as 8-bit codes (QLoRA, section 3).
        scale_dtype: dtype of the effective scales.
    """

    codebook: str = "nf4"
    group_size: int = 64
    double_quant: bool = False
    scale_dtype: str = "float16"
    bits: ClassVar[int] = 4
    sym: ClassVar[bool] = True
    static_groups: ClassVar[bool] = True
    activation: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise ConfigError(
                f"unknown codebook {self.codebook!r}: expected one of {', '.join(CODEBOOKS)}."
                f"{nearest(str(self.codebook), CODEBOOKS)}"
            )
        check_flag("double_quant", self.double_quant)
        _check_group_size(self.group_size)
        _check_scale_dtype(self.scale_dtype)

    @property
    def levels(self) -> int:
        return 16

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale_dtype]


@dataclass(frozen=True, kw_only=True)
class SpqrSpec(IntSpec):
    """A dense asymmetric grid in small groups, and outliers beside it (Dettmers et al., "SpQR", 2023).

    ``w = (code - zero) * scale``, plus a stored difference where the weight is an outlier. Scales and zero points are
    quantized themselves ("bilevel"): `stat_group_size` rows share, per group of columns, a step and an offset of their
    scales, and another pair of their zero points:

        scale = offset + code * step          zero likewise, both computed in float32

    Attributes:
        stat_bits: bits of the codes of scales and zero points, 2 to 8.
        stat_group_size: rows that share steps and offsets; divides `SCALE_BLOCK`.
        outliers: share of the weights that are outliers, 0 to 0.1. A matrix has exactly `outlier_count` of them.
        scale_dtype: dtype of steps, offsets and outliers.
    """

    bits: int = 3
    group_size: int = 16
    sym: bool = False
    stat_bits: int = 3
    stat_group_size: int = 64
    outliers: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sym:
            raise ConfigError("format 'spqr' stores zero points, got sym=True; use format 'int'")
        if not _is_int(self.stat_bits) or not 2 <= self.stat_bits <= 8:
            raise ConfigError(f"stat_bits must be an integer from 2 to 8, got {self.stat_bits!r}")
        size = self.stat_group_size
        if not _is_int(size) or size < 1 or SCALE_BLOCK % size:
            raise ConfigError(
                f"stat_group_size must divide {SCALE_BLOCK} (1, 2, 4, ... rows), got {size!r}"
            )
        share = self.outliers
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 0.1:
            raise ConfigError(f"outliers must be a share from 0 to 0.1, got {share!r}")

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """Of the decoded scales and zero points."""
        return torch.float32

    @property
    def torch_stat_dtype(self) -> torch.dtype:
        """Of what is stored in float: steps, offsets, outliers."""
        return _SCALE_DTYPES[self.scale_dtype]


QuantSpec = IntSpec | CodebookSpec | Fp8Spec


def activation_dtype(spec: QuantSpec) -> torch.dtype:
    """What activations are rounded to where ``spec.activation`` is set: that of the weights' own codes."""
    return E4M3 if isinstance(spec, Fp8Spec) else torch.int8


def with_float_activations(spec: QuantSpec) -> QuantSpec:
    """The same weight, read with activations as they come."""
    return replace(spec, activation=None) if isinstance(spec, (Int8Spec, Fp8Spec)) else spec


def outlier_count(spec: SpqrSpec, out_features: int, in_features: int) -> int:
    """How many outliers an `[N, K]` weight has.

    Counted for `SCALE_BLOCK` rows at a time, so that a weight that is packed in such pieces has as many.
    """
    whole, rest = divmod(out_features, SCALE_BLOCK)
    of_rows = [round(spec.outliers * rows * in_features) for rows in (SCALE_BLOCK, rest)]
    return whole * of_rows[0] + of_rows[1]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(
            f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}."
            f"{nearest(str(activation), ACTIVATIONS)}"
        )


def _check_group_size(group_size: int) -> None:
    if not _is_int(group_size) or (group_size != -1 and group_size < 1):
        raise ConfigError(
            f"group_size must be a positive integer, or -1 for one group per row, got {group_size!r}"
        )


def _check_scale_dtype(name: str) -> None:
    if name not in _SCALE_DTYPES:
        raise ConfigError(
            f"scale_dtype must be one of {', '.join(_SCALE_DTYPES)}, got {name!r}.{nearest(str(name), _SCALE_DTYPES)}"
        )
