"""Memory that mapped checkpoint files take while they are read.

A checkpoint is read through a memory map. Its pages stay in the process until the map is closed, so that a model
quantized while loading would, at its peak, hold the whole float checkpoint beside the packed weights.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Collection
from pathlib import Path

__all__ = ["release_pages", "return_free_memory"]

_MADV_DONTNEED = 4


def release_pages(files: Collection[str]) -> None:
    """Drop the resident pages of mapped files; touched again, they are read again. Linux only, elsewhere nothing.

    The maps are private and unmodified while a checkpoint is loaded, so nothing can be lost.

    Args:
        files: resolved paths.
    """
    madvise = _madvise()
    if madvise is None:
        return
    for line in Path("/proc/self/maps").read_text().splitlines():
        # address perms offset device inode path. Only the path has a slash; a process with a GPU has thousands of lines.
        path = line.find("/")
        if path >= 0 and line[path:] in files:
            start, end = (int(value, 16) for value in line.partition(" ")[0].split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def return_free_memory() -> None:
    """Give freed heap pages back to the system (glibc); loading leaves many."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _madvise() -> Callable[..., int] | None:
    libc = _libc()
    return libc.madvise if libc is not None and hasattr(libc, "madvise") else None
