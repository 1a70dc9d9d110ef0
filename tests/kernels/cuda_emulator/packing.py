"""From float weights to packed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from hfq.core.bits import packed_bytes
from hfq.kernels.fragments import tiles_shape

from .launch import INT, POINTER, SIZE, Launchers, Params, fields, output


class GroupRangeParams(Params):
    """kernels/cuda/packing.h, like the next three."""

    _fields_ = (
        *fields(POINTER, "weight", "low", "high"),
        *fields(SIZE, "rows", "columns", "groups", "group_size"),
        ("dtype", INT),
    )


class NearestCodesParams(Params):
    _fields_ = (
        *fields(POINTER, "weight", "scales", "zeros", "codebook", "codes"),
        *fields(SIZE, "rows", "columns", "groups", "group_size"),
        *fields(INT, "bits", "dtype"),
    )


class ToFragmentsParams(Params):
    _fields_ = (
        *fields(POINTER, "qweight", "tiles"),
        *fields(SIZE, "rows", "columns", "row_bytes"),
        *fields(INT, "bits", "halves"),
    )


class PackCodesParams(Params):
    _fields_ = (
        *fields(POINTER, "codes", "packed"),
        *fields(SIZE, "rows", "columns", "row_bytes"),
        ("bits", INT),
    )


class Packing(Launchers):
    """Groups do not reach beyond a row: group_size is at most K."""

    def group_range(self, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        groups = -(-columns // group_size)
        low, high = (output(rows, groups, dtype=torch.float32) for _ in range(2))
        params = GroupRangeParams(
            weight=weight,
            low=low,
            high=high,
            rows=rows,
            columns=columns,
            groups=groups,
            group_size=group_size,
            dtype=weight.dtype,
        )
        self.launch("group_range", params, low, high)
        return low, high

    def nearest_codes(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        codebook: Tensor | None,
        bits: int,
        group_size: int,
    ) -> Tensor:
        codes = torch.full(weight.shape, 85, dtype=torch.uint8)
        params = NearestCodesParams(
            weight=weight,
            scales=scales,
            zeros=zeros,
            codebook=codebook,
            codes=codes,
            rows=len(weight),
            columns=weight.shape[1],
            groups=scales.shape[1],
            group_size=group_size,
            bits=bits,
            dtype=weight.dtype,
        )
        self.launch("nearest_codes", params, codes)
        return codes

    def pack_codes(self, codes: Tensor, bits: int) -> Tensor:
        rows, columns = codes.shape
        packed = torch.full((rows, packed_bytes(columns, bits)), 85, dtype=torch.uint8)
        params = PackCodesParams(
            codes=codes,
            packed=packed,
            rows=rows,
            columns=columns,
            row_bytes=packed.shape[1],
            bits=bits,
        )
        self.launch("pack_codes", params, packed)
        return packed

    def to_fragments(self, qweight: Tensor, bits: int, halves: bool) -> Tensor:
        """Of uint8 `[N, B, 1]`."""
        rows, row_bytes, _ = qweight.shape
        tiles = torch.full(tiles_shape(qweight.shape, bits), 85, dtype=torch.uint8)
        params = ToFragmentsParams(
            qweight=qweight,
            tiles=tiles,
            rows=rows,
            columns=row_bytes * 8 // bits,
            row_bytes=row_bytes,
            bits=bits,
            halves=int(halves),
        )
        self.launch("to_fragments", params, tiles)
        return tiles
