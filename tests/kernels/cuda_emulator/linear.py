"""Products on layout fragments: few tokens, more, experts; dequantizing and look-ups."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from .launch import FLOAT, H100, INT, MANY, POINTER, SIZE, Launchers, Params, fields, output

# qweight, scales, zeros, codebook
Operands = tuple[Tensor | None, ...]
# bits, group_size, in_features, out_features
Sizes = tuple[int, int, int, int]


class Weight(Params):
    """kernels/cuda/weight.h"""

    _fields_ = (
        *fields(POINTER, "qweight", "scales", "zeros", "codebook"),
        *fields(SIZE, "out_features", "in_features", "groups", "group_size"),
        *fields(INT, "bits", "scale_dtype"),
    )


class LinearParams(Params):
    """kernels/cuda/linear.h"""

    _fields_ = (
        ("weight", Weight),
        *fields(POINTER, "x", "bias", "y"),
        ("tokens", SIZE),
        *fields(INT, "x_dtype", "bias_dtype"),
        ("workspace", POINTER),
        *fields(INT, "token_tiles", "group_magic"),
        *fields(INT, "flush_mask", "stage_bytes", "stages", "stage_tokens"),
    )


class GemmPlan(Params):
    """kernels/cuda/gemm.h"""

    _fields_ = (
        *fields(INT, "tokens", "column_shift", "splits", "split_chunks"),
        *fields(INT, "stages", "stage_bytes", "sums_bytes", "shared_bytes"),
    )


class RangeShape(Params):
    """kernels/cuda/wgmma.h"""

    _fields_ = (
        *fields(INT, "rows", "tokens", "blocks"),
        *fields(SIZE, "chunk", "start", "write", "read"),
    )


class RangePlan(Params):
    """kernels/cuda/wgmma.h"""

    _fields_ = (
        *fields(INT, "units", "tile_units", "unit_chunks", "ranges"),
        *fields(INT, "of_units", "of_ranges", "of_tile_chunks"),
    )


class WidePlan(Params):
    """kernels/cuda/wide.h"""

    _fields_ = fields(INT, "groups", "splits", "warps", "room")


ActiveClusters = ctypes.CFUNCTYPE(INT, INT)


class WideShape(Params):
    """kernels/cuda/wide.h"""

    _fields_ = (
        *fields(INT, "tiles", "warps"),
        *fields(SIZE, "warp_bytes", "table_bytes", "sums_bytes"),
        ("x", FLOAT),
        ("active_clusters", ActiveClusters),
    )


class ExpertsParams(Params):
    """kernels/cuda/experts.h"""

    _fields_ = (
        ("linear", LinearParams),
        ("counts", POINTER),
        *fields(SIZE, "experts", "qweight_bytes", "scale_bytes", "bias_bytes"),
        ("slots", INT),
    )


class UnpackParams(Params):
    """kernels/cuda/unpack.h"""

    _fields_ = (
        ("weight", Weight),
        *fields(POINTER, "index", "y"),
        ("rows", SIZE),
        *fields(INT, "y_dtype", "group_magic"),
    )


def _weight(operands: Operands, sizes: Sizes) -> Weight:
    qweight, scales, zeros, codebook = operands
    bits, group_size, in_features, out_features = sizes
    assert qweight is not None and scales is not None
    return Weight(
        qweight=qweight,
        scales=scales,
        zeros=zeros,
        codebook=codebook,
        out_features=out_features,
        in_features=in_features,
        groups=scales.shape[-3],
        group_size=group_size,
        bits=bits,
        scale_dtype=scales.dtype,
    )


def _product(
    x: Tensor, operands: Operands, bias: Tensor | None, sizes: Sizes
) -> tuple[LinearParams, Tensor]:
    """Parameters, and the output that they point to."""
    y = output(len(x), sizes[3], dtype=x.dtype)
    weight = _weight(operands, sizes)
    return LinearParams(weight=weight, x=x, bias=bias, y=y, tokens=len(x)), y


class Linear(Launchers):
    def linear(
        self,
        x: Tensor,
        operands: Operands,
        bias: Tensor | None,
        sizes: Sizes,
        multiprocessors: int = MANY,
        shared_bytes: int = H100,
        capability: int = 80,
    ) -> Tensor:
        """`capability`: 80 for 8.0."""
        params, y = _product(x, operands, bias, sizes)
        self.set_device(multiprocessors, shared_bytes)
        self._library.set_compute_capability(capability)
        workspace = torch.full((self.ask("linear_workspace", params),), torch.nan)
        params.workspace = workspace.data_ptr()
        self.launch("linear", params, y, workspace)
        return y

    def workspace_of(
        self,
        x: Tensor,
        operands: Operands,
        sizes: Sizes,
        capability: int,
        shared_bytes: int = H100,
        multiprocessors: int = MANY,
    ) -> int:
        """Floats."""
        self.set_device(multiprocessors, shared_bytes)
        self._library.set_compute_capability(capability)
        return self.ask("linear_workspace", _product(x, operands, None, sizes)[0])

    def takes(
        self,
        kernel: str,
        x: Tensor,
        operands: Operands,
        sizes: Sizes,
        capability: int,
        shared_bytes: int = H100,
    ) -> bool:
        """`kernel`: "wide", or "wgmma", which has what that one does not take; more than 8 tokens."""
        self.set_device(MANY, shared_bytes)
        self._library.set_compute_capability(capability)
        return bool(self.ask(f"takes_{kernel}", _product(x, operands, None, sizes)[0]))

    def workspace(
        self,
        tokens: int,
        sizes: Sizes,
        capability: int,
        shared_bytes: int = H100,
        multiprocessors: int = 1,
    ) -> int:
        """Floats of a product with an int weight."""
        bits, group_size, in_features, out_features = sizes
        weight = Weight(
            out_features=out_features,
            in_features=in_features,
            groups=-(-in_features // group_size),
            group_size=group_size,
            bits=bits,
            scale_dtype=torch.float16,
        )
        self.set_device(multiprocessors, shared_bytes)
        self._library.set_compute_capability(capability)
        params = LinearParams(weight=weight, tokens=tokens, x_dtype=torch.bfloat16)
        return self.ask("linear_workspace", params)

    def arranged(self, x: Tensor, floats: int) -> Tensor:
        """x `[M, K]`, bits of 16-bit numbers as int16, as wgmma_tokens.cu leaves it in a workspace of so many floats."""
        workspace = torch.full((floats,), torch.nan)
        weight = Weight(in_features=x.shape[1])
        params = LinearParams(weight=weight, x=x.view(torch.bfloat16), tokens=len(x))
        params.workspace = workspace.data_ptr()
        self.launch("arrange", params, workspace)
        return workspace.view(torch.int16)

    def gemm_plan(
        self, tokens: int, sizes: Sizes, kind: str | None, multiprocessors: int, shared_bytes: int
    ) -> GemmPlan:
        """How a product is cut; `kind`: "zeros", a codebook's name, or None."""
        bits, group_size, in_features, out_features = sizes
        weight = Weight(
            zeros=int(kind == "zeros"),
            codebook=int(kind not in (None, "zeros")),
            out_features=out_features,
            in_features=in_features,
            groups=-(-in_features // group_size),
            group_size=group_size,
            bits=bits,
        )
        plan = GemmPlan()
        self.set_device(multiprocessors, shared_bytes)
        params = LinearParams(weight=weight, tokens=tokens)
        self._library.gemm_plan(ctypes.byref(params), ctypes.byref(plan))
        return plan

    def range_plan(
        self, tokens: int, sizes: Sizes, clusters: int, blocks: int | None = None
    ) -> tuple[RangeShape, RangePlan]:
        """How a product is shared out among `clusters` that run at a time, of one block, or of two for more than 64 tokens."""
        weight = Weight(out_features=sizes[3], in_features=sizes[2])
        shape, plan = RangeShape(), RangePlan()
        params = LinearParams(weight=weight, tokens=tokens)
        self.set_device(clusters * (blocks or (1 if tokens <= 64 else 2)))
        self._library.range_plan(
            ctypes.byref(params), clusters, ctypes.byref(shape), ctypes.byref(plan)
        )
        return shape, plan

    def quotient(self, n: int, divisor: int) -> int:
        """n / divisor as kernels find it."""
        function = self._library.quotient
        function.argtypes, function.restype = (ctypes.c_uint32, ctypes.c_uint32), ctypes.c_uint32
        return int(function(n, divisor))

    def takes_wide(self, tokens: int, sizes: Sizes, kind: str) -> bool:
        """On compute capability 9.0; `kind`: "int4" or a codebook's name."""
        bits, group_size, in_features, out_features = sizes
        weight = Weight(
            codebook=int(kind != "int4"),
            out_features=out_features,
            in_features=in_features,
            groups=-(-in_features // group_size),
            group_size=group_size,
            bits=bits,
        )
        self.set_device(1)
        self._library.set_compute_capability(90)
        return bool(self.ask("takes_wide", LinearParams(weight=weight, tokens=tokens)))

    def wide_plan(
        self, all_tiles: int, steps: int, active: Callable[[int], int], **shape: float
    ) -> WidePlan:
        """How a product of so many tiles of rows and steps of columns is shared out; `active`: clusters of so many blocks that run at a time."""
        self.set_device(1)
        called = WideShape(active_clusters=ActiveClusters(active), **shape)
        plan = WidePlan()
        self._library.wide_plan(
            SIZE(all_tiles), SIZE(steps), ctypes.byref(called), ctypes.byref(plan)
        )
        return plan

    def experts_linear(
        self,
        x: Tensor,
        counts: Tensor,
        operands: Operands,
        bias: Tensor | None,
        sizes: Sizes,
        multiprocessors: int = MANY,
        shared_bytes: int = H100,
    ) -> Tensor:
        """`linear` with stacks: `operands` and `bias` have E in front, like counts int64 `[E]`."""
        qweight, scales = operands[:2]
        assert qweight is not None and scales is not None
        linear, y = _product(x, operands, bias, sizes)
        params = ExpertsParams(
            linear=linear,
            counts=counts,
            experts=len(counts),
            qweight_bytes=qweight[0].nbytes,
            scale_bytes=scales[0].nbytes,
            bias_bytes=0 if bias is None else bias[0].nbytes,
        )
        self.set_device(multiprocessors, shared_bytes)
        self.launch("experts", params, y)
        return y

    def unpack(
        self, index: Tensor | None, operands: Operands, sizes: Sizes, dtype: torch.dtype
    ) -> Tensor:
        """The rows `index`, or all of them."""
        rows = sizes[3] if index is None else len(index)
        y = output(rows, sizes[2], dtype=dtype)
        params = UnpackParams(weight=_weight(operands, sizes), index=index, y=y, rows=rows)
        self.launch("unpack", params, y)
        return y
