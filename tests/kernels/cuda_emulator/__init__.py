"""The CUDA kernels on the CPU: kernels/cuda compiled by a C++ compiler against tests/kernels/cuda_on_cpu, called with tensors.

A module for each family of kernels has its structs and launchers; `launch` has what all of them need, `compiler` makes the libraries.

Where the lines of a new kernel go: its launcher in cuda_on_cpu/exports.cpp, its struct and a method in a module here, its tests in a
test_cuda_*_emulated.py, with the random weights of its family (fragments_weights, spqr_weights, w8a8_weights). Its operator: in
torch_binding_cuda_*.cpp, of which `compiler` and cuda_on_cpu/operators.cpp have lists, in a script cuda_on_cpu/check_*.py, on the CPU
in a test_cuda_*ops.py and on a GPU in a test_cuda*.py (what those share: on_gpu).
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
