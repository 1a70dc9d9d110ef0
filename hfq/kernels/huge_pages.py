"""Tensors in huge pages.

A decode step streams every weight once. With 4 KiB pages the processor spends a good part of that time on address
translation (measured here: 33 GB/s against 52 GB/s with 2 MiB pages), so the runtime layouts of the CPU kernels
are placed in memory that the kernel was asked to back with huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HUGE_PAGE", "available", "empty"]

HUGE_PAGE = 2 << 20  # bytes, x86-64 and most aarch64 kernels
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def available() -> tuple[bool, str]:
    """Whether huge pages can be asked for, and why not (an empty string if they can)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False, "this operating system has no madvise(MADV_HUGEPAGE)"
    try:
        setting = _SETTING.read_text()
    except OSError as error:
        return False, f"cannot read {_SETTING}: {error.strerror}"
    if "[never]" in setting:
        return False, f"{_SETTING} is 'never' (set it to 'madvise' to allow huge pages)"
    return True, ""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor, in huge pages if it is at least 2 MiB and they are available.

    The mapping is released with the tensor's storage. The unaligned slack around it is never touched, so it takes
    address space but no memory.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < HUGE_PAGE or not available()[0]:
        return torch.empty(tuple(shape), dtype=dtype)
    length = -(-size // HUGE_PAGE) * HUGE_PAGE
    try:
        # Private: what is shared, Python's default, comes from shmem, whose own setting for huge pages is mostly "never".
        mapping = mmap.mmap(-1, length + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no address space left under a ulimit: the allocator may still find memory
        return torch.empty(tuple(shape), dtype=dtype)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = -address % HUGE_PAGE
    with contextlib.suppress(OSError):  # built without huge pages: the mapping is still good memory
        mapping.madvise(mmap.MADV_HUGEPAGE, offset, length)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(tuple(shape))
