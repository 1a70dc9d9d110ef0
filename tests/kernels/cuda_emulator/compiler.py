"""Libraries of the kernels (and, with them, of their operators) for the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock

TESTS = Path(__file__).parents[1]
EMULATOR = TESTS / "cuda_on_cpu"
KERNELS = TESTS.parents[1] / "kernels"
# The first CUDA kernel, for the neutral layout, is written against CUDA's own types; the other files have no kernel.
NOT_EMULATED = {KERNELS / "cuda" / name for name in ("dequantize.cu", "launch.cu", "runtime.cu")}
SOURCES = sorted(set((KERNELS / "cuda").glob("*.cu")) - NOT_EMULATED)
# The GPU contracts multiplications and additions where kernels let it; they say where that is wrong. `_FORTIFY_SOURCE` forbids fibers to change places.
FLAGS = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
)
# Each access of a kernel calls cuda_on_cpu/hooks.cpp.
WATCHED = "-fsanitize=thread"
DEVICE = [EMULATOR / f"{name}.cpp" for name in ("device", "fibers", "hooks", "races")]


def compiled_kernels(folder: Path, *, watched: bool) -> Path:
    """The library of launchers, which can look for races if it is `watched`."""
    library = folder / "libcuda_on_cpu.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            options = [WATCHED] if watched else []
            kernels = _compiled(folder, SOURCES, *options)
            _link(library, [*kernels, *_compiled(folder, [*DEVICE, EMULATOR / "exports.cpp"])])
    return library


def compiled_watched(folder: Path, names: Sequence[str]) -> Path:
    """The library of launchers, which can look for races in the kernels of these files: of the others it takes what is compiled already."""
    compiled_kernels(folder, watched=False)
    library = folder / "libwatched.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            own = folder / "watched"
            own.mkdir(exist_ok=True)
            watched = _compiled(own, [KERNELS / "cuda" / name for name in names], WATCHED)
            others = [source for source in SOURCES if source.name not in names]
            device = [*DEVICE, EMULATOR / "exports.cpp"]
            # The watched ones first: functions that several files have are taken from them.
            _link(library, [*watched, *(_object(folder, source) for source in (*others, *device))])
    return library


def compiled_self_check(folder: Path) -> Path:
    """The library of small kernels with mistakes; it can look for races."""
    library = folder / "libself_check.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            kernels = _compiled(folder, [EMULATOR / "self_check.cpp"], WATCHED)
            _link(library, [*kernels, *_compiled(folder, DEVICE)])
    return library


def check_operators(folder: Path, script: str, *arguments: str) -> None:
    """Run a script of cuda_on_cpu with the library of operators and `arguments`: the binding, rows and modules on CPU tensors, in a process whose CPU is the emulated GPU.

    `folder` is where the kernels were compiled.
    """
    places = filter(None, (str(EMULATOR), str(TESTS), os.environ.get("PYTHONPATH")))
    run = subprocess.run(
        [sys.executable, str(EMULATOR / script), str(_compiled_operators(folder)), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all checks passed" in run.stdout


@cache
def _compiled_operators(folder: Path) -> Path:
    device = "-Daoti_torch_device_type_cuda=aoti_torch_device_type_cpu"
    names = ("decode", "fragments", "fp8", "int8", "packing", "spqr")
    bindings = [KERNELS / f"torch-ext/torch_binding_cuda_{name}.cpp" for name in names]
    library = folder / "libcuda_operators_on_cpu.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            objects = _compiled(folder, [*bindings, EMULATOR / "operators.cpp"], device)
            objects += [_object(folder, source) for source in (*SOURCES, *DEVICE)]
            _link(library, objects, str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    return library


def _object(folder: Path, source: Path) -> Path:
    return folder / f"{source.name}.o"


def _compiled(folder: Path, sources: Sequence[Path], *options: str) -> list[Path]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")

    def compiled(source: Path) -> Path:
        target = _object(folder, source)
        command = [compiler, *FLAGS, *options, "-DHFQ_CUDA_ON_CPU", f"-I{EMULATOR}", "-x", "c++"]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def _link(library: Path, objects: Sequence[Path], *options: str) -> None:
    words = ["g++", "-shared", *map(str, objects), *options, "-o", str(library)]
    subprocess.run(words, check=True)
