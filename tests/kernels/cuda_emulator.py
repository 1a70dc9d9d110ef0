"""The CUDA kernels on the CPU: kernels/cuda compiled by a C++ compiler against tests/kernels/cuda_on_cpu, called with tensors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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


class _TokensParams(ctypes.Structure):
    """kernels/cuda/w8a8.h"""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "input_scale", "codes", "scales")),
        *((name, _SIZE) for name in ("tokens", "in_features")),
        ("x_dtype", _INT),
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
        *((name, _INT) for name in ("token_tiles", "step_columns", "group_magic")),
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
            "scale_sums",
            "spqr_linear",
            "spqr_unpack",
            "self_check",
        ):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.linear_workspace.restype = ctypes.c_int64

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

    def quantize_tokens(self, x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes `[M, K]` and scales `[M, 1]`."""
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
        )
        self._run(self._library.quantize_tokens, params, (x, input_scale), memory)
        return codes, scales

    def linear_w8a8(
        self,
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        multiprocessors: int = 1 << 20,
    ) -> Tensor:
        """`qweight`: two's complement `[N, K]`. Quantizes apart where the operator does."""
        tokens, out_features = len(x), len(qweight)
        in_features = x.shape[1]
        inside = bool(self._library.quantizes_inside(_SIZE(tokens), _SIZE(in_features)))
        codes, token_scales = None, None
        if not inside:
            codes, token_scales = self.quantize_tokens(x, input_scale)
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
        self._run(self._library.linear_w8a8, params, read, y)
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

    def spqr_linear(self, x: Tensor, grid: SpqrGrid, bias: Tensor | None) -> Tensor:
        """`grid`: in the layout of the kernel row."""
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
        params: ctypes.Structure,
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
    """Compile kernels and emulator into a library."""
    sources = [
        *SOURCES,
        EMULATOR / "fibers.cpp",
        EMULATOR / "exports.cpp",
        EMULATOR / "self_check.cpp",
    ]
    return Emulator(_library(folder, "libcuda_on_cpu.so", _compiled(folder, sources)))


def build_operators(folder: Path) -> Path:
    """Compile the operators into a library; `folder` is where `build` was."""
    device = "-Daoti_torch_device_type_cuda=aoti_torch_device_type_cpu"
    sources = [
        ROOT / "kernels/torch-ext/torch_binding_cuda_fragments.cpp",
        ROOT / "kernels/torch-ext/torch_binding_cuda_int8.cpp",
        ROOT / "kernels/torch-ext/torch_binding_cuda_spqr.cpp",
        EMULATOR / "operators.cpp",
    ]
    objects = _compiled(folder, sources, device)
    objects += [folder / f"{source.name}.o" for source in (*SOURCES, EMULATOR / "fibers.cpp")]
    torch_library = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    return _library(folder, "libcuda_operators_on_cpu.so", objects, str(torch_library))


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


def _library(folder: Path, name: str, objects: Sequence[Path], *options: str) -> Path:
    library = folder / name
    words = ["g++", "-shared", *map(str, objects), *options, "-o", str(library)]
    subprocess.run(words, check=True)
    return library
