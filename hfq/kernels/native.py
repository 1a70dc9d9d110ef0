"""The native kernels: which libraries are loaded, for which instruction sets, and why not.

`load` is called at the first use of a kernel, not at import. Without native kernels everything still works on the
PyTorch reference; that is said once, with the reason and the remedy.

``HFQ_CPU_ISA`` forces an instruction set: auto, or one of `NativeStatus.isas` (see `use_isa` for tests).
``HFQ_CUDA_KERNELS=off`` leaves the CUDA kernels out: models on GPUs then run on the PyTorch reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..core.errors import KernelError
from .gpu_code import driver_problem

__all__ = [
    "CUDA_VARIABLE",
    "ISA_VARIABLE",
    "NativeStatus",
    "cuda_graph",
    "cuda_is_off",
    "has_tiles",
    "isa",
    "load",
    "use_isa",
]

ISA_VARIABLE = "HFQ_CPU_ISA"
CUDA_VARIABLE = "HFQ_CUDA_KERNELS"
_REMEDY = "install a C++ compiler (Debian: apt install g++) and reinstall hfq, or run scripts/build_native in a checkout"

_lock = threading.Lock()
_loaded: _Loaded | None = None
_selected = ""  # a plain value: compilers trace code that asks for it


@dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """What native code this process has.

    Attributes:
        cpu, cuda: whether the library is loaded.
        cpu_reason, cuda_reason: why not; empty if loaded.
        isa: instruction set that the CPU kernels use, empty without them.
        isas: those that this build and this processor support, best first.
        build: build_info.json of the installed libraries; empty if there is none.
        cuda_versions: of the runtime in the library and of the driver, such as 12040; 0 if unknown.
    """

    cpu: bool
    cuda: bool
    cpu_reason: str = ""
    cuda_reason: str = ""
    isa: str = ""
    isas: tuple[str, ...] = ()
    build: Mapping[str, Any] = field(default_factory=dict)
    cuda_versions: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    status: NativeStatus
    library: ctypes.CDLL | None
    cuda_library: ctypes.CDLL | None


def load() -> NativeStatus:
    """Load the native libraries, once per process; thread safe.

    Raises:
        KernelError: ``HFQ_CPU_ISA`` names an instruction set that is unknown or not supported here, or ``HFQ_CUDA_KERNELS``
            is neither auto nor off.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
                if not _loaded.status.cpu:
                    _warn(_loaded.status)
    return _loaded.status


def isa() -> str:
    """The instruction set that the CPU kernels use now, empty without them; see `load`."""
    load()
    return _selected


def cuda_graph(stream: int) -> int:
    """The number of the CUDA graph into which the work of a stream (its handle) is captured; 0 if there is none, or nobody knows."""
    load()
    assert _loaded is not None
    return 0 if _loaded.cuda_library is None else int(_loaded.cuda_library.hfq_cuda_capture(stream))


def cuda_is_off() -> bool:
    """Whether the user leaves the CUDA kernels out.

    Raises:
        KernelError: ``HFQ_CUDA_KERNELS`` is neither auto nor off.
    """
    wanted = os.environ.get(CUDA_VARIABLE) or "auto"
    if wanted not in ("auto", "off"):
        raise KernelError(
            f"the environment variable {CUDA_VARIABLE} has to be auto or off, not {wanted!r}"
        )
    return wanted == "off"


def has_tiles() -> bool:
    """Whether the instruction set in use multiplies many tokens on matrix units, with int8 or bfloat16 activations."""
    return isa() == "avx512_amx"


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set inside the block, in every thread. For tests and benchmarks.

    Raises:
        KernelError: the name is unknown or not supported here.
    """
    load()
    assert _loaded is not None
    if _loaded.library is None:
        raise KernelError(
            f"cannot select the instruction set {name!r}: {_loaded.status.cpu_reason}"
        )
    before = _selected
    _select_isa(_loaded.library, name, source="use_isa")
    try:
        yield
    finally:
        _select_isa(_loaded.library, before, source="use_isa")


def _load() -> _Loaded:
    folder = _library_folder()
    build = _build_info(folder)
    library, cpu_reason = _load_cpu(folder, build)
    cuda_library, cuda_reason, cuda_versions = _load_cuda(folder, build)
    status = NativeStatus(
        cpu=library is not None,
        cuda=cuda_library is not None,
        cpu_reason=cpu_reason,
        cuda_reason=cuda_reason,
        isa="" if library is None else _selected,
        isas=() if library is None else _isas(library),
        build=MappingProxyType(build),
        cuda_versions=cuda_versions,
    )
    return _Loaded(status=status, library=library, cuda_library=cuda_library)


def _load_cpu(folder: Path | None, build: Mapping[str, Any]) -> tuple[ctypes.CDLL | None, str]:
    path, reason = _find(folder, build, "cpu")
    if path is None:
        return None, f"{reason}; {_REMEDY}"
    reason = _load_library(path)
    if reason:
        return None, reason
    library = ctypes.CDLL(str(path))
    library.hfq_cpu_isa.restype = ctypes.c_char_p
    library.hfq_cpu_isas.restype = ctypes.c_char_p
    library.hfq_cpu_select_isa.argtypes = [ctypes.c_char_p]
    if not library.hfq_cpu_registered():
        return (
            None,
            f"{path.name} could not register its operators with torch {torch.__version__} (2.11 or later needed)",
        )
    _select_isa(
        library,
        os.environ.get(ISA_VARIABLE) or "auto",
        source=f"the environment variable {ISA_VARIABLE}",
    )
    return library, ""


def _load_cuda(
    folder: Path | None, build: Mapping[str, Any]
) -> tuple[ctypes.CDLL | None, str, tuple[int, int]]:
    """Load the CUDA kernels; None and why not, or the library and an empty string; the versions of CUDA."""
    unknown = (0, 0)
    if cuda_is_off():
        return None, f"{CUDA_VARIABLE}=off leaves them out", unknown
    path, reason = _find(folder, build, "cuda")
    if path is None:
        return None, reason, unknown
    if torch.version.cuda is None:
        return None, f"this PyTorch ({torch.__version__}) is built without CUDA", unknown
    reason = _load_library(path)
    if reason:
        return None, reason, unknown
    library = ctypes.CDLL(str(path))
    if not library.hfq_cuda_registered():
        reason = f"{path.name} could not register its operators with torch {torch.__version__} (2.11 or later needed)"
        return None, reason, unknown
    try:
        versions = (library.hfq_cuda_runtime_version(), library.hfq_cuda_driver_version())
        library.hfq_cuda_capture.argtypes = [ctypes.c_void_p]
        library.hfq_cuda_capture.restype = ctypes.c_uint64
    except AttributeError:  # a checkout that has changed
        return None, f"{path.name} was built from other sources of hfq: build it again", unknown
    problem = driver_problem(*versions)
    return (None, problem, versions) if problem else (library, "", versions)


def _library_folder() -> Path | None:
    """The folder that holds build_info.json. An editable install keeps sources and built files in two places."""
    import hfq

    for package in hfq.__path__:
        folder = Path(package) / "lib"
        if (folder / "build_info.json").is_file():
            return folder
    return None


def _build_info(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    info: dict[str, Any] = json.loads((folder / "build_info.json").read_text())
    return info


def _find(folder: Path | None, build: Mapping[str, Any], kind: str) -> tuple[Path | None, str]:
    """The library's path, or None and the reason."""
    if folder is None:
        return None, "hfq was installed without native libraries"
    path = folder / f"libhfq_{kind}.so"
    if path.is_file():
        return path, ""
    return None, str(build[kind]["reason"]) or f"{path} is missing"


def _load_library(path: Path) -> str:
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    return ""


def _isa(library: ctypes.CDLL) -> str:
    name: bytes = library.hfq_cpu_isa()
    return name.decode()


def _isas(library: ctypes.CDLL) -> tuple[str, ...]:
    names: bytes = library.hfq_cpu_isas()
    return tuple(names.decode().split(","))


def _select_isa(library: ctypes.CDLL, name: str, source: str) -> None:
    global _selected
    if not library.hfq_cpu_select_isa(name.encode()):
        supported = ", ".join(("auto", *_isas(library)))
        raise KernelError(
            f"{source} asks for the instruction set {name!r}; this build and processor support {supported}"
        )
    _selected = _isa(library)


def _warn(status: NativeStatus) -> None:
    warnings.warn(
        f"hfq runs without its native CPU kernels, on slower PyTorch code: {status.cpu_reason}",
        RuntimeWarning,
        stacklevel=3,
    )
