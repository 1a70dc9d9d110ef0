"""Format ``spqr``: small asymmetric groups with bilevel scales, and outliers in compressed rows.

    weight                 uint8 [N, ceil(K * bits / 8), 1]             codes, a little-endian bit stream per row
    weight_scale           uint8 [N, ceil(2 * G * stat_bits / 8), 1]    of each group the codes of scale and zero
    weight_scale_stat      scale_dtype [ceil(N / stat_group_size), G, 4]
                           step and offset of the scales, step and offset of the zero points
    weight_outlier_count   int16 [N]                                    outliers of each row (int32 from K = 2^15 on)
    weight_outlier_column  int16 [Z]                                    ascending within a row, likewise
    weight_outlier         scale_dtype [Z]                              what to add to the dense weight there

With g = k // group_size and r = n // stat_group_size

    scale[n, g] = stat[r, g, 1] + scale_code[n, g] * stat[r, g, 0]
    zero[n, g]  = stat[r, g, 3] + zero_code[n, g] * stat[r, g, 2]
    w[n, k]     = (code[n, k] - zero[n, g]) * scale[n, g] + outlier, where there is one

Z follows from the spec (`hfq.core.spec.outlier_count`), so all shapes are known before anything is read. Counts
instead of offsets let a slice of rows be a slice of the tensors; kernels get offsets, summed up once.
(Dettmers et al., "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", 2023.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ..core import bits
from ..core.bilevel import decode_bilevel
from ..core.errors import CheckpointError
from ..core.spec import QuantSpec, SpqrSpec, columns_per_group, group_count, outlier_count
from ..core.weight import Outliers, QuantizedWeight, ScaleCodes, SpqrGrid, index_dtype
from . import FORMATS, TensorLayout, chosen

_SETTINGS = (
    "bits",
    "group_size",
    "sym",
    "scale_dtype",
    "stat_bits",
    "stat_group_size",
    "outliers",
)


class Spqr:
    """2 to 8 bits in small asymmetric groups, bilevel scales, sparse outliers."""

    name = "spqr"

    def spec(self, settings: Mapping[str, object]) -> SpqrSpec:
        return SpqrSpec(**chosen(settings, _SETTINGS, self.name))

    def layout(
        self, spec: QuantSpec, out_features: int, in_features: int
    ) -> dict[str, TensorLayout]:
        spec = cast(SpqrSpec, spec)
        groups = group_count(in_features, spec.group_size)
        row_bytes = bits.packed_bytes(in_features, spec.bits)
        stat_bytes = bits.packed_bytes(2 * groups, spec.stat_bits)
        blocks = -(-out_features // spec.stat_group_size)
        index, outliers = index_dtype(in_features), outlier_count(spec, out_features, in_features)
        return {
            "weight": TensorLayout((out_features, row_bytes, 1), torch.uint8),
            "weight_scale": TensorLayout((out_features, stat_bytes, 1), torch.uint8),
            "weight_scale_stat": TensorLayout((blocks, groups, 4), spec.torch_stat_dtype),
            "weight_outlier_count": TensorLayout((out_features,), index),
            "weight_outlier_column": TensorLayout((outliers,), index),
            "weight_outlier": TensorLayout((outliers,), spec.torch_stat_dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        spec, scales, zeros = cast(SpqrSpec, weight.spec), weight.scale_codes, weight.zero_codes
        assert scales is not None and zeros is not None and weight.outliers is not None
        codes = torch.stack([scales.codes, zeros.codes], -1).flatten(1)
        return {
            "weight": bits.pack(weight.codes, spec.bits).unsqueeze(-1),
            "weight_scale": bits.pack(codes, spec.stat_bits).unsqueeze(-1),
            "weight_scale_stat": torch.stack(
                [scales.step, scales.offset, zeros.step, zeros.offset], -1
            ),
            "weight_outlier_count": weight.outliers.counts.contiguous(),
            "weight_outlier_column": weight.outliers.columns.contiguous(),
            "weight_outlier": weight.outliers.values.contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, in_features: int
    ) -> QuantizedWeight:
        spec = cast(SpqrSpec, spec)
        groups = group_count(in_features, spec.group_size)
        codes = bits.unpack(tensors["weight_scale"].squeeze(-1), spec.stat_bits, 2 * groups)
        stats = tensors["weight_scale_stat"].unbind(-1)
        scales = ScaleCodes(codes=codes[..., ::2], step=stats[0], offset=stats[1])
        zeros = ScaleCodes(codes=codes[..., 1::2], step=stats[2], offset=stats[3])
        return QuantizedWeight(
            spec=spec,
            codes=bits.unpack(tensors["weight"].squeeze(-1), spec.bits, in_features),
            scales=decode_bilevel(scales, spec.stat_group_size),
            zeros=decode_bilevel(zeros, spec.stat_group_size),
            scale_codes=scales,
            zero_codes=zeros,
            outliers=Outliers(
                counts=tensors["weight_outlier_count"],
                columns=tensors["weight_outlier_column"],
                values=tensors["weight_outlier"],
            ),
        )

    def grid(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> SpqrGrid:
        spec = cast(SpqrSpec, spec)
        ends = tensors["weight_outlier_count"].cumsum(-1, dtype=torch.int32)
        return SpqrGrid(
            qweight=tensors["weight"],
            stat_codes=tensors["weight_scale"],
            stats=tensors["weight_scale_stat"],
            offsets=torch.nn.functional.pad(ends, (1, 0)),
            columns=tensors["weight_outlier_column"],
            values=tensors["weight_outlier"],
            bits=spec.bits,
            group_size=columns_per_group(in_features, spec.group_size),
            stat_bits=spec.stat_bits,
            stat_group_size=spec.stat_group_size,
            in_features=in_features,
            out_features=out_features,
        )

    def check_values(self, tensors: Mapping[str, Tensor], in_features: int) -> None:
        counts, columns = (
            tensors[key].long() for key in ("weight_outlier_count", "weight_outlier_column")
        )
        stored, ends = columns.shape[-1], counts.cumsum(-1)
        if counts.numel() and (int(counts.min()) < 0 or not bool((ends[..., -1] == stored).all())):
            raise CheckpointError(
                f"the outliers of the rows must be counted from 0 on and add up to the {stored} that are stored, got "
                f"counts from {int(counts.min())} on that add up to {ends[..., -1].tolist()}; the checkpoint is damaged"
            )
        if not columns.numel():
            return
        if not 0 <= int(columns.min()) <= int(columns.max()) < in_features:
            raise CheckpointError(
                f"outliers must stand in columns 0 to {in_features - 1}, got columns {int(columns.min())} to "
                f"{int(columns.max())}; the checkpoint is damaged"
            )
        # Sorted by (row, column), without a pair twice.
        rows = torch.searchsorted(
            ends,
            torch.arange(stored, device=ends.device).expand(columns.shape).contiguous(),
            right=True,
        )
        if bool((rows * in_features + columns).diff(dim=-1).le(0).any()):
            raise CheckpointError(
                "the columns of the outliers must ascend within each row; the checkpoint is damaged"
            )


FORMATS.register("spqr", Spqr())
