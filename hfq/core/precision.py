"""Faster products of float32 matrices, for those that know how exact theirs must be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["bfloat16_products"]


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Within, processors with matrix units for bfloat16 round the operands of float32 products on the CPU to it.

    Sums stay float32, so nothing is lost where the operands were bfloat16 before. Other processors compute as ever.
    """
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
