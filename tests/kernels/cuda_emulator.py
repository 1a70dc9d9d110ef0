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

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_on_cpu"
# The first CUDA kernel, for the neutral layout, is written against CUDA's own types.
SOURCES = sorted(set((ROOT / "kernels/cuda").glob("*.cu")) - {ROOT / "kernels/cuda/dequantize.cu"})
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


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


class Emulator:
    """The launchers, with the arguments of the operators ``hfq::cuda_*``."""

    def __init__(self, library: Path) -> None:
        self.folder = library.parent
        self._library = ctypes.CDLL(str(library))
        for launcher in (self._library.linear, self._library.unpack, self._library.self_check):
            launcher.restype = ctypes.c_char_p
        self._library.experts.restype = ctypes.c_char_p
        self._library.linear_workspace.restype = ctypes.c_int64

    def linear(
        self,
        x: Tensor,
        operands: tuple[Tensor | None, ...],
        bias: Tensor | None,
        sizes: tuple[int, int, int, int],
        multiprocessors: int = 1 << 20,
        shared_bytes: int = 227 << 10,
    ) -> Tensor:
        """`operands`: qweight, scales, zeros, codebook; `sizes`: bits, group_size, in_features, out_features.

        The GPU has `multiprocessors`, and gives a thread block `shared_bytes` of shared memory.
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
        floats = self._library.linear_workspace(ctypes.byref(params))
        workspace = torch.full((floats,), torch.nan)
        params.workspace = workspace.data_ptr()
        self._run(self._library.linear, params, (x, *operands, bias), y, workspace)
        return y

    def experts_linear(
        self,
        x: Tensor,
        counts: Tensor,
        operands: tuple[Tensor | None, ...],
        bias: Tensor | None,
        sizes: tuple[int, int, int, int],
        multiprocessors: int = 1 << 20,
    ) -> Tensor:
        """The same with stacks: `operands` and `bias` have E in front, like counts int64 `[E]`."""
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
        self._library.set_device(multiprocessors, ctypes.c_size_t(227 << 10))
        self._run(self._library.experts, params, (x, counts, *operands, bias), y)
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
