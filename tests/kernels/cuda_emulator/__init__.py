"""The CUDA kernels on the CPU: kernels/cuda compiled by a C++ compiler against tests/kernels/cuda_on_cpu, called with tensors.

A module for each family of kernels has its structs and launchers; `launch` has what all of them need, `compiler` makes the libraries.
"""

from __future__ import annotations

from pathlib import Path

from .compiler import check_operators, compiled_kernels
from .decode import Decode
from .linear import Linear
from .spqr import Spqr
from .w8a8 import W8A8

__all__ = ["Emulator", "build", "check_operators"]


class Emulator(Linear, Spqr, W8A8, Decode):
    """The launchers, with the arguments of the operators ``hfq::cuda_*``."""


def build(folder: Path) -> Emulator:
    """Kernels and emulator, compiled if no other process has done it."""
    return Emulator(compiled_kernels(folder))
