"""Second moments of activations: the sums that calibration takes while a model runs.

    cpu_add_moment(total [K, K], x [T, K]) -> ()      total += x^T x, on and above the diagonal

``total`` float32, x bfloat16, both contiguous. Native code for processors with matrix units (instruction set
"avx512_amx"); all else is PyTorch's products, in `SecondMoment`. What lies below the diagonal of a total means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import native
from .ops import LIBRARY

__all__ = ["SecondMoment"]

# Columns per product: only the upper triangle of the sum is computed, in pieces of this width, so that a moment of
# many columns takes little more than half of the operations.
_WIDTH = 1024

# Tokens that are widened to float32 at a time.
_TOKENS = 4096

LIBRARY.define("cpu_add_moment(Tensor(a!) total, Tensor x) -> ()")


class SecondMoment:
    """A running sum of x y^T over tokens, float32 `[K, K]`.

    Args:
        columns: K.
        symmetric: y is always x, so that one triangle is enough.
    """

    def __init__(self, columns: int, device: torch.device, symmetric: bool = True) -> None:
        self.total = torch.zeros(columns, columns, device=device)
        self.symmetric = symmetric

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens `[T, K]` of any float dtype."""
        if self.symmetric and x.dtype == torch.bfloat16 and x.is_cpu and _has_matrix_units():
            torch.ops.hfq.cpu_add_moment(self.total, x.contiguous())
            return
        # Of values that were bfloat16 before, products in bfloat16 lose nothing: their sums are float32.
        exact = x.dtype == y.dtype == torch.bfloat16
        with _bfloat16_products() if exact else nullcontext():
            for some, others in zip(torch.split(x, _TOKENS), torch.split(y, _TOKENS), strict=True):
                wide = _columns(some)
                self._add(wide, wide if y is x else _columns(others))

    def _add(self, x: Tensor, y: Tensor) -> None:
        columns = self.total.shape[0]
        for start in range(0, columns, _WIDTH):
            stop = min(start + _WIDTH, columns)
            first = start if self.symmetric else 0
            self.total[start:stop, first:].addmm_(x[start:stop], y[first:].T)

    def mean(self, tokens: int) -> Tensor:
        """The mean `[K, K]`; nothing can be added afterwards."""
        self.total /= max(tokens, 1)
        if self.symmetric:
            # Square by square: at no time is there a second matrix.
            columns = self.total.shape[0]
            for start in range(0, columns, _WIDTH):
                stop = min(start + _WIDTH, columns)
                square = self.total[start:stop, start:stop]
                square.copy_(square.triu() + square.triu(1).T)
                self.total[stop:, start:stop] = self.total[start:stop, stop:].T
        return self.total


def _has_matrix_units() -> bool:
    return native.isa() == "avx512_amx"


def _columns(tokens: Tensor) -> Tensor:
    """Tokens `[T, K]` as float32 `[K, T]`, each column one run of memory: a fifth faster for the products."""
    return tokens.T.contiguous().float()


@contextmanager
def _bfloat16_products() -> Iterator[None]:
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
