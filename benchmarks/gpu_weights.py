"""Random packed weights as kernels read them, many times over, so that no cache holds the next one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfq.algorithms import ALGORITHMS
from hfq.core.spec import QuantSpec
from hfq.core.weight import QuantizedWeight
from hfq.formats import FORMATS
from hfq.kernels import dispatch
from hfq.kernels.row import Problem
from hfq.nn.layout import neutral_grid, to_kernel
from hfq.nn.packing import pack_weight
from hfq.nn.slot import PackedSlot

__all__ = [
    "KINDS",
    "Dense",
    "Kind",
    "Packed",
    "random_tokens",
    "random_weight",
    "relative_error",
]

# Weights are gone through until this many times the last cache was read.
_CACHES = 4


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Attributes:
    format, settings: as in `HfqConfig`.
    bound: of the relative error of a product: rounding of the output, and of the activations where the format asks for it.
    """

    format: str
    settings: Mapping[str, Any]
    bound: float

    @property
    def spec(self) -> QuantSpec:
        return FORMATS.get(self.format).spec(self.settings)


def _ints(bits: int, **settings: Any) -> Kind:
    return Kind(format="int", settings={"bits": bits, "group_size": 128, **settings}, bound=0.005)


KINDS: dict[str, Kind] = {
    "int4 g128": _ints(4),
    "int4 g128 zeros": _ints(4, sym=False),
    "int3 g128": _ints(3),
    "int2 g128": _ints(2),
    "int8 g128": _ints(8),
    "nf4 g64": Kind(format="nf4", settings={"group_size": 64}, bound=0.005),
    "fp8 weights": Kind(format="fp8", settings={}, bound=0.005),
    # Steps of 1/127 of a token's largest value; 3 bits of mantissa.
    "W8A8 dynamic": Kind(format="int8", settings={"activation": "dynamic"}, bound=0.02),
    "fp8 dynamic": Kind(format="fp8", settings={"activation": "dynamic"}, bound=0.04),
    "spqr 3 bits": Kind(format="spqr", settings={"bits": 3}, bound=0.005),
}


class Packed:
    """One weight `[N, K]` at several addresses.

    Attributes:
        bound: of its kind.
        choice: the kernel, and why others were refused.
        grids: in the kernel's layout.
        size: bytes of one.
        exact: the values, float64.
    """

    def __init__(self, kind: Kind, n: int, k: int, device: torch.device, cache_bytes: int) -> None:
        spec, packed_format = kind.spec, FORMATS.get(kind.format)
        slot = PackedSlot(
            base="weight", format=kind.format, spec=spec, out_features=n, in_features=k
        )
        rtn = ALGORITHMS.get("rtn")

        def encode(rows: Tensor) -> QuantizedWeight:
            return rtn.quantize(rows, spec, rtn.options)

        self.bound = kind.bound
        held = pack_weight(random_weight(n, k, device), slot, encode)
        self.exact = packed_format.unpack(held, spec, k).dequantize().double()
        grid = neutral_grid(slot, held)
        self.choice = dispatch.select(Problem.of(grid))
        grid, _ = to_kernel(grid, held, self.choice.row)
        tensors = {name: t.detach() for name, t in vars(grid).items() if isinstance(t, Tensor)}
        self.size = sum(t.nbytes for name, t in tensors.items() if name != "codebook")
        self.grids = [
            replace(grid, **{name: t.clone() for name, t in tensors.items()})
            for _ in range(copies(self.size, cache_bytes))
        ]
        self._turn = itertools.cycle(self.grids)

    def linear(self, x: Tensor) -> Tensor:
        """``x W^T`` with the next copy, activations as exact as the kernel has them."""
        y: Tensor = self.choice.row.linear(x, next(self._turn), None, False)
        return y

    def checked(self, x: Tensor) -> tuple[float, str]:
        """The relative error of a product, and what is wrong with it, if anything is."""
        error = relative_error(self.linear(x), x.double() @ self.exact.T)
        wrong = not error < self.bound  # NaN is
        return error, f"relative error {error:.4f}, at most {self.bound}" if wrong else ""


class Dense:
    """A bfloat16 weight `[N, K]` at several addresses."""

    def __init__(self, n: int, k: int, device: torch.device, cache_bytes: int) -> None:
        weight = random_weight(n, k, device)
        self.weights = [weight.clone() for _ in range(copies(weight.nbytes, cache_bytes))]
        self._turn = itertools.cycle(self.weights)

    def linear(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, next(self._turn))

    def gradient(self, grad: Tensor) -> Tensor:
        return grad @ next(self._turn)


def copies(size: int, cache_bytes: int) -> int:
    return max(2, -(-_CACHES * cache_bytes // size))


def random_weight(n: int, k: int, device: torch.device) -> Tensor:
    """Normal bfloat16 `[N, K]`, the same for the same sizes."""
    generator = torch.Generator(device).manual_seed(n + k)
    weight = torch.empty(n, k, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, 0.02, generator=generator)


def random_tokens(m: int, k: int, device: torch.device) -> Tensor:
    """Activations, normal bfloat16 `[M, K]`, the same for the same sizes."""
    generator = torch.Generator(device).manual_seed(m)
    return torch.randn(m, k, generator=generator, device=device, dtype=torch.bfloat16)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the whole tensor; NaN where anything is."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
