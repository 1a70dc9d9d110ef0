"""The CUDA kernels on the CPU: kernels/cuda compiled by a C++ compiler against tests/kernels/cuda_on_cpu, called with tensors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from hfq.core.float8 import E4M3
from hfq.core.weight import SpqrGrid
from hfq.kernels.neutral_spqr import operands

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_on_cpu"
# The first CUDA kernel, for the neutral layout, is written against CUDA's own types.
SOURCES = sorted(set((ROOT / "kernels/cuda").glob("*.cu")) - {ROOT / "kernels/cuda/dequantize.cu"})
# The GPU contracts multiplications and additions where kernels let it; they say where that is wrong.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

# Of an H100, for a thread block; for kernels to which it does not matter.
_SHARED_BYTES = ctypes.c_size_t(227 << 10)


class _Weight(ctypes.Structure):
    """kernels/cuda/weight.h"""

    _fields_ = (
        *((name, _POINTER) for name in ("qweight", "scales", "zeros", "codebook")),
        *((name, _SIZE) for name in ("out_features", "in_features", "groups", "group_size")),
        *((name, _INT) for name in ("bits", "scale_dtype")),
    )


class _LinearParams(ctypes.Structure):
    """kernels/cuda/linear.h"""

    _fields_ = (
        ("weight", _Weight),
        *((name, _POINTER) for name in ("x", "bias", "y")),
        ("tokens", _SIZE),
        *((name, _INT) for name in ("x_dtype", "bias_dtype")),
        ("workspace", _POINTER),
        *((name, _INT) for name in ("token_tiles", "group_magic")),
        *((name, _INT) for name in ("flush_mask", "stages", "stage_bytes", "stage_tokens")),
    )


class GemmPlan(ctypes.Structure):
    """kernels/cuda/gemm.h"""

    _fields_ = tuple(
        (name, _INT)
        for name in (
            *("tokens", "column_shift", "splits", "split_chunks"),
            *("stages", "stage_bytes", "sums_bytes", "shared_bytes"),
        )
    )


class _ExpertsParams(ctypes.Structure):
    """kernels/cuda/experts.h"""

    _fields_ = (
        ("linear", _LinearParams),
        ("counts", _POINTER),
        *((name, _SIZE) for name in ("experts", "qweight_bytes", "scale_bytes", "bias_bytes")),
        ("slots", _INT),
    )


class _UnpackParams(ctypes.Structure):
    """kernels/cuda/unpack.h"""

    _fields_ = (
        ("weight", _Weight),
        *((name, _POINTER) for name in ("index", "y")),
        ("rows", _SIZE),
        ("y_dtype", _INT),
    )


class NormParams(ctypes.Structure):
    """kernels/common/decode.h, like the next three."""

    _fields_ = (
        ("rows", _SIZE),
        ("columns", _SIZE),
        ("dtype", _INT),
        *((name, _POINTER) for name in ("x", "weight", "y")),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
        ("round_first", ctypes.c_bool),
    )


class RotateParams(ctypes.Structure):
    _fields_ = (
        *((name, _SIZE) for name in ("tokens", "heads", "size")),
        ("dtype", _INT),
        ("x", _POINTER),
        ("x_stride", _SIZE),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("shared", ctypes.c_bool),
        ("y", _POINTER),
    )


class GateParams(ctypes.Structure):
    _fields_ = (
        ("rows", _SIZE),
        ("columns", _SIZE),
        ("dtype", _INT),
        ("gate", _POINTER),
        ("up", _POINTER),
        ("gate_stride", _SIZE),
        ("up_stride", _SIZE),
        ("y", _POINTER),
        ("tanh_gelu", ctypes.c_bool),
    )


class AttendParams(ctypes.Structure):
    _fields_ = (
        *((name, _SIZE) for name in ("batch", "heads", "kv_heads", "size", "length", "room")),
        ("dtype", _INT),
        *((name, _POINTER) for name in ("q", "k", "v", "mask")),
        ("mask_batch", _SIZE),
        ("mask_heads", _SIZE),
        ("mask_is_bool", ctypes.c_bool),
        ("scale", ctypes.c_float),
        ("y", _POINTER),
    )


class _TokensParams(ctypes.Structure):
    """kernels/cuda/w8a8.h"""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "input_scale", "codes", "scales")),
        *((name, _SIZE) for name in ("tokens", "in_features")),
        *((name, _INT) for name in ("x_dtype", "code_type")),
    )


class _W8A8Params(ctypes.Structure):
    """kernels/cuda/w8a8.h"""

    _fields_ = (
        *((name, _POINTER) for name in ("qweight", "scales", "x", "input_scale", "codes")),
        *((name, _POINTER) for name in ("token_scales", "bias", "y")),
        *((name, _SIZE) for name in ("tokens", "out_features", "in_features")),
        *((name, _INT) for name in ("scale_dtype", "x_dtype", "bias_dtype", "token_blocks")),
    )


class _ScaleSumsParams(ctypes.Structure):
    """kernels/cuda/w8a8.h"""

    _fields_ = (
        *((name, _POINTER) for name in ("sums", "token_scales", "scales", "bias", "y")),
        *((name, _SIZE) for name in ("tokens", "out_features")),
        *((name, _INT) for name in ("scale_dtype", "bias_dtype", "y_dtype")),
        ("in_fours", ctypes.c_bool),
    )


class _SpqrWeight(ctypes.Structure):
    """kernels/cuda/spqr.h"""

    _fields_ = (
        *((name, _POINTER) for name in ("qweight", "stat_codes", "stats")),
        *((name, _POINTER) for name in ("offsets", "columns", "values")),
        *((name, _SIZE) for name in ("out_features", "in_features", "groups", "stat_groups")),
        *((name, _SIZE) for name in ("group_size", "rows_per_stat", "outliers")),
        *((name, _INT) for name in ("bits", "wide_codes", "wide_columns", "stat_dtype")),
    )


class _SpqrLinearParams(ctypes.Structure):
    """kernels/cuda/spqr.h"""

    _fields_ = (
        ("weight", _SpqrWeight),
        *((name, _POINTER) for name in ("x", "bias", "y")),
        ("tokens", _SIZE),
        *((name, _INT) for name in ("x_dtype", "bias_dtype")),
        *((name, _INT) for name in ("token_tiles", "short_groups", "last_group", "group_magic")),
        *((name, _INT) for name in ("row_bytes", "steps", "last_step", "stages", "stage_bytes")),
        *((name, _INT) for name in ("tile_stats", "stage_tokens", "ring_bytes")),
    )


class _SpqrUnpackParams(ctypes.Structure):
    """kernels/cuda/spqr.h"""

    _fields_ = (
        ("weight", _SpqrWeight),
        *((name, _POINTER) for name in ("index", "y")),
        ("rows", _SIZE),
        ("y_dtype", _INT),
    )


class Emulator:
    """The launchers, with the arguments of the operators ``hfq::cuda_*``."""

    def __init__(self, library: Path) -> None:
        self.folder = library.parent
        self._library = ctypes.CDLL(str(library))
        for name in (
            "linear",
            "experts",
            "unpack",
            "quantize_tokens",
            "linear_w8a8",
            "linear_fp8",
            "scale_sums",
            "spqr_linear",
            "spqr_unpack",
            "rms_norm",
            "rotate",
            "gate",
            "attend",
            "self_check",
        ):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.linear_workspace.restype = ctypes.c_int64
        self._library.attend_workspace.restype = ctypes.c_int64

    def linear(
        self,
        x: Tensor,
        operands: tuple[Tensor | None, ...],
        bias: Tensor | None,
        sizes: tuple[int, int, int, int],
        multiprocessors: int = 1 << 20,
        shared_bytes: int = 227 << 10,
        capability: int = 80,
    ) -> Tensor:
        """`operands`: qweight, scales, zeros, codebook; `sizes`: bits, group_size, in_features, out_features.

        The GPU has `multiprocessors`, and gives a thread block `shared_bytes` of shared memory. `capability`: 80 for 8.0.
        """
        y = torch.full((len(x), sizes[3]), 12345.0, dtype=x.dtype)
        params = _LinearParams(
            weight=_weight(operands, sizes),
            x=x.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            tokens=len(x),
            x_dtype=_DTYPES[x.dtype],
            bias_dtype=0 if bias is None else _DTYPES[bias.dtype],
        )
        self._library.set_device(multiprocessors, ctypes.c_size_t(shared_bytes))
        self._library.set_compute_capability(capability)
        floats = self._library.linear_workspace(ctypes.byref(params))
        workspace = torch.full((floats,), torch.nan)
        params.workspace = workspace.data_ptr()
        self._run(self._library.linear, params, (x, *operands, bias), y, workspace)
        return y

    def gemm_plan(
        self,
        tokens: int,
        sizes: tuple[int, int, int, int],
        kind: str | None,
        multiprocessors: int,
        shared_bytes: int,
    ) -> GemmPlan:
        """How a product is cut; `kind`: "zeros", a codebook's name, or None."""
        bits, group_size, in_features, out_features = sizes
        weight = _Weight(
            zeros=int(kind == "zeros"),
            codebook=int(kind not in (None, "zeros")),
            out_features=out_features,
            in_features=in_features,
            groups=-(-in_features // group_size),
            group_size=group_size,
            bits=bits,
        )
        plan = GemmPlan()
        self._library.set_device(multiprocessors, ctypes.c_size_t(shared_bytes))
        params = _LinearParams(weight=weight, tokens=tokens)
        self._library.gemm_plan(ctypes.byref(params), ctypes.byref(plan))
        return plan

    def experts_linear(
        self,
        x: Tensor,
        counts: Tensor,
        operands: tuple[Tensor | None, ...],
        bias: Tensor | None,
        sizes: tuple[int, int, int, int],
        multiprocessors: int = 1 << 20,
    ) -> Tensor:
        """`linear` with stacks: `operands` and `bias` have E in front, like counts int64 `[E]`."""
        qweight, scales = operands[:2]
        assert qweight is not None and scales is not None
        y = torch.full((len(x), sizes[3]), 12345.0, dtype=x.dtype)
        linear = _LinearParams(
            weight=_weight(operands, sizes),
            x=x.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            tokens=len(x),
            x_dtype=_DTYPES[x.dtype],
            bias_dtype=0 if bias is None else _DTYPES[bias.dtype],
        )
        params = _ExpertsParams(
            linear=linear,
            counts=counts.data_ptr(),
            experts=len(counts),
            qweight_bytes=qweight[0].numel(),
            scale_bytes=scales[0].numel() * scales.element_size(),
            bias_bytes=0 if bias is None else bias[0].numel() * bias.element_size(),
        )
        self._library.set_device(multiprocessors, _SHARED_BYTES)
        self._run(self._library.experts, params, (x, counts, *operands, bias), y)
        return y

    def unpack(
        self,
        index: Tensor | None,
        operands: tuple[Tensor | None, ...],
        sizes: tuple[int, int, int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """The rows `index`, or all of them."""
        rows = sizes[3] if index is None else len(index)
        y = torch.full((rows, sizes[2]), 12345.0, dtype=dtype)
        params = _UnpackParams(
            weight=_weight(operands, sizes),
            index=0 if index is None else index.data_ptr(),
            y=y.data_ptr(),
            rows=rows,
            y_dtype=_DTYPES[dtype],
        )
        self._run(self._library.unpack, params, (index, *operands), y)
        return y

    def quantize_tokens(
        self, x: Tensor, input_scale: Tensor | None, dtype: torch.dtype = torch.int8
    ) -> tuple[Tensor, Tensor]:
        """Codes `[M, K]` of `dtype`, int8 or E4M3, and scales `[M, 1]`."""
        tokens, in_features = x.shape
        # One memory, as results are one tensor here.
        memory = torch.full((tokens, in_features + 4), 85, dtype=torch.int8)
        codes = memory.view(-1)[: tokens * in_features].view(tokens, in_features)
        scales = memory.view(-1)[tokens * in_features :].view(torch.float32).view(tokens, 1)
        params = _TokensParams(
            x=x.data_ptr(),
            input_scale=_address(input_scale),
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            tokens=tokens,
            in_features=in_features,
            x_dtype=_DTYPES[x.dtype],
            code_type=int(dtype == E4M3),
        )
        self._run(self._library.quantize_tokens, params, (x, input_scale), memory)
        return codes.view(dtype), scales

    def linear_w8a8(
        self,
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        multiprocessors: int = 1 << 20,
        dtype: torch.dtype = torch.int8,
    ) -> Tensor:
        """`qweight`: uint8 `[N, K]`, two's complement or, where `dtype` is E4M3, its bytes. Quantizes apart where the operator does."""
        tokens, out_features = len(x), len(qweight)
        in_features = x.shape[1]
        kind, sizes = _INT(dtype == E4M3), (_SIZE(tokens), _SIZE(in_features))
        inside = bool(self._library.quantizes_inside(kind, *sizes))
        codes, token_scales = None, None
        if not inside:
            codes, token_scales = self.quantize_tokens(x, input_scale, dtype)
        y = torch.full((tokens, out_features), 12345.0, dtype=x.dtype)
        params = _W8A8Params(
            qweight=qweight.data_ptr(),
            scales=scales.data_ptr(),
            x=_address(x if inside else None),
            input_scale=_address(input_scale if inside else None),
            codes=_address(codes),
            token_scales=_address(token_scales),
            bias=_address(bias),
            y=y.data_ptr(),
            tokens=tokens,
            out_features=out_features,
            in_features=in_features,
            scale_dtype=_DTYPES[scales.dtype],
            x_dtype=_DTYPES[x.dtype],
            bias_dtype=0 if bias is None else _DTYPES[bias.dtype],
        )
        self._library.set_device(multiprocessors, _SHARED_BYTES)
        read = (x, qweight, scales, input_scale, codes, token_scales, bias)
        launcher = self._library.linear_fp8 if dtype == E4M3 else self._library.linear_w8a8
        self._run(launcher, params, read, y)
        return y

    def scale_sums(
        self,
        out: Tensor,
        sums: Tensor,
        token_scales: Tensor,
        scales: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Into `out`."""
        params = _ScaleSumsParams(
            sums=sums.data_ptr(),
            token_scales=token_scales.data_ptr(),
            scales=scales.data_ptr(),
            bias=_address(bias),
            y=out.data_ptr(),
            tokens=len(sums),
            out_features=sums.shape[1],
            scale_dtype=_DTYPES[scales.dtype],
            bias_dtype=0 if bias is None else _DTYPES[bias.dtype],
            y_dtype=_DTYPES[out.dtype],
        )
        self._run(self._library.scale_sums, params, (sums, token_scales, scales, bias), out)

    def spqr_linear(
        self,
        x: Tensor,
        grid: SpqrGrid,
        bias: Tensor | None,
        multiprocessors: int = 1 << 20,
        shared_bytes: int = 227 << 10,
    ) -> Tensor:
        """`grid`: in the layout of the kernel row. One multiprocessor takes two tiles at once."""
        y = torch.full((len(x), grid.out_features), 12345.0, dtype=x.dtype)
        params = _SpqrLinearParams(
            weight=_spqr_weight(grid),
            x=x.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            tokens=len(x),
            x_dtype=_DTYPES[x.dtype],
            bias_dtype=0 if bias is None else _DTYPES[bias.dtype],
        )
        self._library.set_device(multiprocessors, ctypes.c_size_t(shared_bytes))
        self._run(self._library.spqr_linear, params, (x, *operands(grid), bias), y)
        return y

    def spqr_unpack(self, index: Tensor | None, grid: SpqrGrid, dtype: torch.dtype) -> Tensor:
        """The rows `index`, or all of them."""
        rows = grid.out_features if index is None else len(index)
        y = torch.full((rows, grid.in_features), 12345.0, dtype=dtype)
        params = _SpqrUnpackParams(
            weight=_spqr_weight(grid),
            index=0 if index is None else index.data_ptr(),
            y=y.data_ptr(),
            rows=rows,
            y_dtype=_DTYPES[dtype],
        )
        self._run(self._library.spqr_unpack, params, (index, *operands(grid)), y)
        return y

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
    ) -> Tensor:
        y = torch.full_like(x, 12345.0)
        params = NormParams(
            rows=x.numel() // x.shape[-1],
            columns=x.shape[-1],
            dtype=_DTYPES[x.dtype],
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            y=y.data_ptr(),
            eps=eps,
            offset=offset,
            round_first=round_first,
        )
        self._run(self._library.rms_norm, params, (x, weight), y)
        return y

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`q` and `k` may be parts of the columns of a contiguous tensor."""
        size = cos.shape[-1]
        both = (RotateParams * 2)()
        results = []
        for params, x in zip(both, (q, k), strict=True):
            heads = x.shape[-1] // size
            y = torch.full((len(x), heads, 1, size), 12345.0, dtype=x.dtype)
            results.append(y)
            params.tokens, params.heads, params.size = len(x), heads, size
            params.dtype, params.x, params.x_stride = _DTYPES[x.dtype], x.data_ptr(), x.stride(0)
            params.cos, params.sin, params.shared = cos.data_ptr(), sin.data_ptr(), len(cos) == 1
            params.y = y.data_ptr()
        whole = [_around(x) for x in (q, k)]
        self._run(self._library.rotate, both, (*whole, cos, sin), *results)
        return results[0], results[1]

    def gate(self, gate: Tensor, up: Tensor, tanh_gelu: bool) -> Tensor:
        """Both contiguous, or parts of the columns of contiguous tensors."""
        y = torch.full(gate.shape, 12345.0, dtype=gate.dtype)
        columns = gate.shape[-1]
        gate_stride, up_stride = (
            each.stride(-2) if each.dim() > 1 else columns for each in (gate, up)
        )
        params = GateParams(
            rows=gate.numel() // columns,
            columns=columns,
            dtype=_DTYPES[gate.dtype],
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            gate_stride=gate_stride,
            up_stride=up_stride,
            y=y.data_ptr(),
            tanh_gelu=tanh_gelu,
        )
        self._run(self._library.gate, params, (_around(gate), _around(up)), y)
        return y

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        length: int,
        mask: Tensor | None,
        scale: float,
        multiprocessors: int = 1,
    ) -> Tensor:
        batch, heads, _, size = q.shape
        y = torch.full((batch, 1, heads * size), 12345.0, dtype=q.dtype)
        by_head = mask is not None and mask.shape[1] > 1
        by_batch = mask is not None and mask.shape[0] > 1
        params = AttendParams(
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            size=size,
            length=length,
            room=k.shape[2],
            dtype=_DTYPES[q.dtype],
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            mask=_address(mask),
            mask_batch=length * (heads if by_head else 1) if by_batch else 0,
            mask_heads=length if by_head else 0,
            mask_is_bool=mask is not None and mask.dtype == torch.bool,
            scale=scale,
            y=y.data_ptr(),
        )
        self._library.set_device(multiprocessors, _SHARED_BYTES)
        floats = self._library.attend_workspace(ctypes.byref(params))
        workspace = torch.full((floats,), torch.nan)
        self._allow((q, k, v, mask), y, workspace)
        _raise(self._library.attend(ctypes.byref(params), ctypes.c_void_p(workspace.data_ptr())))
        return y

    def self_check(self, name: str, x: Tensor) -> Tensor:
        """What a kernel of self_check.cpp makes of int32 `[128]`."""
        y = torch.zeros_like(x)
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
        self._allow((x,), y)
        _raise(self._library.self_check(name.encode(), *pointers))
        return y

    def _run(
        self,
        launcher: Any,
        params: ctypes.Structure | ctypes.Array[Any],
        read: tuple[Tensor | None, ...],
        *written: Tensor,
    ) -> None:
        self._allow(read, *written)
        _raise(launcher(ctypes.byref(params)))

    def _allow(self, read: tuple[Tensor | None, ...], *written: Tensor) -> None:
        self._library.forget_all()
        for tensors, writable in ((read, 0), (written, 1)):
            for tensor in tensors:
                if tensor is not None:
                    assert tensor.is_contiguous()
                    size = ctypes.c_size_t(tensor.numel() * tensor.element_size())
                    self._library.allow(ctypes.c_void_p(tensor.data_ptr()), size, writable)


def _around(part: Tensor) -> Tensor:
    """The contiguous memory from the first to the last number of a part of the columns of a tensor."""
    if part.is_contiguous():
        return part
    rows = part.numel() // part.shape[-1]
    return part.as_strided(((rows - 1) * part.stride(-2) + part.shape[-1],), (1,))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def _weight(operands: tuple[Tensor | None, ...], sizes: tuple[int, int, int, int]) -> _Weight:
    qweight, scales, zeros, codebook = operands
    bits, group_size, in_features, out_features = sizes
    assert qweight is not None and scales is not None
    return _Weight(
        qweight=qweight.data_ptr(),
        scales=scales.data_ptr(),
        zeros=0 if zeros is None else zeros.data_ptr(),
        codebook=0 if codebook is None else codebook.data_ptr(),
        out_features=out_features,
        in_features=in_features,
        groups=scales.shape[-3],
        group_size=group_size,
        bits=bits,
        scale_dtype=_DTYPES[scales.dtype],
    )


def _spqr_weight(grid: SpqrGrid) -> _SpqrWeight:
    return _SpqrWeight(
        **{name: getattr(grid, name).data_ptr() for name in ("qweight", "stat_codes", "stats")},
        **{name: getattr(grid, name).data_ptr() for name in ("offsets", "columns", "values")},
        out_features=grid.out_features,
        in_features=grid.in_features,
        groups=grid.stats.shape[-2],
        stat_groups=grid.stat_codes.shape[-3],
        group_size=grid.group_size,
        rows_per_stat=grid.stat_group_size,
        outliers=len(grid.columns),
        bits=grid.bits,
        wide_codes=grid.stat_bits > 4,
        wide_columns=grid.columns.dtype == torch.int32,
        stat_dtype=_DTYPES[grid.stats.dtype],
    )


def build(folder: Path) -> Emulator:
    """Compile kernels and emulator into a library, if no other process has done it."""
    sources = [
        *SOURCES,
        EMULATOR / "fibers.cpp",
        EMULATOR / "exports.cpp",
        EMULATOR / "self_check.cpp",
    ]
    library = folder / "libcuda_on_cpu.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            _link(library, _compiled(folder, sources))
    return Emulator(library)


def check_operators(folder: Path, script: str, *arguments: str) -> None:
    """Run a script of cuda_on_cpu with the library of operators and `arguments`: the binding, rows and modules on CPU tensors, in a process whose CPU is the emulated GPU.

    `folder` is where `build` was.
    """
    places = filter(None, (str(EMULATOR), os.environ.get("PYTHONPATH")))
    run = subprocess.run(
        [sys.executable, str(EMULATOR / script), str(_build_operators(folder)), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all checks passed" in run.stdout


@cache
def _build_operators(folder: Path) -> Path:
    device = "-Daoti_torch_device_type_cuda=aoti_torch_device_type_cpu"
    sources = [
        ROOT / "kernels/torch-ext/torch_binding_cuda_decode.cpp",
        ROOT / "kernels/torch-ext/torch_binding_cuda_fragments.cpp",
        ROOT / "kernels/torch-ext/torch_binding_cuda_fp8.cpp",
        ROOT / "kernels/torch-ext/torch_binding_cuda_int8.cpp",
        ROOT / "kernels/torch-ext/torch_binding_cuda_spqr.cpp",
        EMULATOR / "operators.cpp",
    ]
    library = folder / "libcuda_operators_on_cpu.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            objects = _compiled(folder, sources, device)
            objects += [
                folder / f"{source.name}.o" for source in (*SOURCES, EMULATOR / "fibers.cpp")
            ]
            torch_library = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
            _link(library, objects, str(torch_library))
    return library


def _compiled(folder: Path, sources: Sequence[Path], *options: str) -> list[Path]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = [compiler, *FLAGS, *options, "-DHFQ_CUDA_ON_CPU", f"-I{EMULATOR}", "-x", "c++"]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def _link(library: Path, objects: Sequence[Path], *options: str) -> None:
    words = ["g++", "-shared", *map(str, objects), *options, "-o", str(library)]
    subprocess.run(words, check=True)
