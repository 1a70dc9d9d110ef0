"""Whether the library of CUDA kernels runs on this driver and this GPU.

The library brings its own CUDA runtime, which is not PyTorch's: whoever builds it with a newer nvcc than the driver is made for gets
a library that loads, and launches nothing. A runtime runs on drivers of its major version and later ("minor version
compatibility" in NVIDIA's manual). Machine code runs on GPUs of the same major compute capability and the same or a later minor one, with
"a" on that one alone, with "f" on its family. For later GPUs the driver compiles PTX, of its own version of CUDA or older.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["architecture", "driver_problem", "gpu_problem", "has_code"]

# Names of CMake: 80-real is machine code, 90-virtual PTX, 120 both.
_NAME = re.compile(r"(\d+)(\d)([af]?)(-real|-virtual)?")

# GPUs of Jetson boards: their machine code and that of other GPUs run on nothing else.
_JETSON = {(7, 2), (8, 7), (10, 1), (11, 0)}


def driver_problem(runtime: int, driver: int) -> str | None:
    """Why a CUDA runtime launches nothing with a driver, or None.

    Args:
        runtime, driver: versions such as 12040; 0 for a driver that is not there.
    """
    if not driver or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"they were built with CUDA {_text(runtime)}, the driver runs programs up to CUDA {_text(driver)}: update the driver, or "
        f"reinstall hfq with nvcc of CUDA {driver // 1000} on the PATH"
    )


def gpu_problem(
    archs: Sequence[str], capability: tuple[int, int], runtime: int, driver: int
) -> str | None:
    """Why GPUs of a compute capability cannot run a library, or None.

    Args:
        archs: what it was built for; nothing is known about an empty one, or other names than those of numbers.
        runtime, driver: as for `driver_problem`.
    """
    if not archs or not all(map(_NAME.fullmatch, archs)) or has_code(archs, capability):
        return None
    gpus = f"GPUs of compute capability {capability[0]}.{capability[1]}"
    rebuild = (
        f"reinstall hfq with CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES={architecture(capability)}-real"
    )
    if not _has_ptx(archs, capability):
        return f"they were built for {', '.join(archs)}, which {gpus} do not run: {rebuild}"
    if driver and driver < runtime:
        return (
            f"{gpus} need them compiled by the driver, which is older (CUDA {_text(driver)}) than the compiler that built them (CUDA "
            f"{_text(runtime)}): update it, or {rebuild}"
        )
    return None


def has_code(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether there is machine code for GPUs of a compute capability."""
    for major, minor, kind, form in _parsed(archs):
        alone = kind == "a" or not _JETSON.isdisjoint({(major, minor), capability})
        later = major == capability[0] and minor < capability[1]
        if form != "-virtual" and ((major, minor) == capability or (later and not alone)):
            return True
    return False


def architecture(capability: tuple[int, int]) -> str:
    """CMake's name for it; kernels for 9.0 use what only code for that one capability may."""
    name = f"{capability[0]}{capability[1]}"
    return f"{name}a" if name == "90" else name


def _has_ptx(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    return any(
        form != "-real" and not kind and (major, minor) <= capability
        for major, minor, kind, form in _parsed(archs)
    )


def _parsed(archs: Iterable[str]) -> list[tuple[int, int, str, str | None]]:
    found = [match for match in map(_NAME.fullmatch, archs) if match is not None]
    return [(int(each[1]), int(each[2]), each[3], each[4]) for each in found]


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
