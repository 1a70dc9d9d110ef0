"""The CUDA kernels on the CPU: kernels/cuda compiled by a C++ compiler against tests/kernels/cuda_on_cpu, called with tensors.

A module for each family of kernels has its structs and launchers; `launch` has what all of them need, `compiler` makes the libraries.

Where the lines of a new kernel go: its launcher in cuda_on_cpu/exports.cpp, its struct and a method in a module here, its tests in a
test_cuda_*_emulated.py, with the random weights of its family (fragments_weights, spqr_weights, w8a8_weights). Its operator: in
torch_binding_cuda_*.cpp, of which `compiler` and cuda_on_cpu/operators.cpp have lists, in a script cuda_on_cpu/check_*.py, on the CPU
in a test_cuda_*ops.py and on a GPU in a test_cuda*.py (what those share: on_gpu).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .compiler import check_operators, compiled_kernels, compiled_self_check, compiled_watched
from .decode import Decode
from .launch import POINTER, Launchers
from .linear import Linear
from .packing import Packing
from .spqr import Spqr
from .w8a8 import W8A8

__all__ = ["Emulator", "SelfCheck", "build", "build_self_check", "build_watched", "check_operators"]


class Emulator(Linear, Spqr, W8A8, Decode, Packing):
    """The launchers, with the arguments of the operators ``hfq::cuda_*``.

    races: whether they fail where nothing orders two accesses to memory (cuda_on_cpu/races.h).
    """

    def __init__(self, library: Path, races: bool) -> None:
        super().__init__(library)
        self.races = races
        self.watch_races(races)


class SelfCheck(Launchers):
    """Kernels of cuda_on_cpu/self_check.cpp."""

    def run(self, name: str, x: Tensor) -> Tensor:
        """What one makes of int32 `[128]`."""
        y = torch.zeros_like(x)
        pointers = (POINTER(x.data_ptr()), POINTER(y.data_ptr()))
        self.call("self_check", [x], [y], name.encode(), *pointers)
        return y


def build(folder: Path, *, races: bool = False) -> Emulator:
    """Kernels and emulator, compiled if no other process has done it; `races` takes twice as long."""
    return Emulator(compiled_kernels(folder, watched=races), races)


def build_watched(folder: Path, names: Sequence[str]) -> Emulator:
    """Kernels and emulator, which looks for races in the kernels of these files of kernels/cuda."""
    return Emulator(compiled_watched(folder, names), races=True)


def build_self_check(folder: Path) -> SelfCheck:
    """The emulator and what shows that it sees mistakes; `watch_races` has it look for those of order."""
    return SelfCheck(compiled_self_check(folder))
