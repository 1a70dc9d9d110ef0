"""Memory that one dequantized weight after the other is written to.

A new tensor of tens of MiB is new memory. The first write to each of its pages is a fault, in which
the operating system clears it: a weight of 33 MB took 14 to 26 ms to dequantize into a new tensor,
5 to 10 into memory that was used before (one thread, benchmarks/NOTES.md).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["scratch"]

# Bytes that a thread keeps at most; what needs more is new memory each time.
_LARGEST = 256 << 20

_LOCAL = threading.local()


def scratch(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor; the next call in this thread may hand out the same memory."""
    size = math.prod(shape) * dtype.itemsize
    if size > _LARGEST:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    buffer: Tensor | None = getattr(_LOCAL, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _LOCAL.buffer = buffer = None  # freed before there is a larger one
        _LOCAL.buffer = buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    return buffer[:size].view(dtype).view(tuple(shape))
