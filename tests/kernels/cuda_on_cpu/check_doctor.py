"""The self-test of `hfq doctor` on the CUDA kernels, emulated on the CPU; see operators_on_cpu.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from operators_on_cpu import on_cpu, use_row

from hfq.core.spec import QuantSpec
from hfq.core.weight import Fp8Grid, PackedGrid, SpqrGrid
from hfq.diagnose.selftest import WEIGHTS, self_test
from hfq.kernels import cuda, cuda_fp8, cuda_int8, cuda_spqr

CPU = torch.device("cpu")


def check(grid: type[Any], row: type[Any], weights: list[tuple[str, QuantSpec]]) -> None:
    assert weights
    use_row(grid, on_cpu(row))
    for verdict in self_test(CPU, weights):
        assert not verdict.faults and verdict.kernel == row.name, verdict


def of(name: str, bits: int, activation: str | None = None) -> list[tuple[str, QuantSpec]]:
    """One of the self-test's weights: kernels of other bits have tests of their own, and the emulator takes its time."""
    return [
        (known, spec)
        for known, spec in WEIGHTS
        if (known, spec.bits, spec.activation) == (name, bits, activation)
    ][:1]


if __name__ == "__main__":
    check(PackedGrid, cuda.CudaFragments, of("int", 4) + of("nf4", 4))
    check(PackedGrid, cuda_int8.CudaInt8, of("int8", 8, "dynamic"))
    check(Fp8Grid, cuda_fp8.CudaFp8Weights, of("fp8", 8))
    check(Fp8Grid, cuda_fp8.CudaFp8, of("fp8", 8, "dynamic"))
    check(Fp8Grid, cuda_fp8.CudaFp8Widened, of("fp8", 8, "dynamic"))
    check(SpqrGrid, cuda_spqr.CudaSpqr, of("spqr", 3))
    sys.stdout.write("all checks passed\n")
