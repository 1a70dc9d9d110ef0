"""The self-test of `hfq doctor` on the CUDA kernels, emulated on the CPU; see operators_on_cpu.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from operators_on_cpu import on_cpu, use_row

from hfq.core.spec import QuantSpec
from hfq.core.weight import Fp8Grid, PackedGrid, SpqrGrid
from hfq.diagnose.self_test import WEIGHTS, self_test
from hfq.kernels import cuda, cuda_fp8, cuda_int8, cuda_spqr

CPU = torch.device("cpu")


def check(grid: type[Any], row: type[Any], weights: list[tuple[str, QuantSpec]]) -> None:
    assert weights
    use_row(grid, on_cpu(row))
    for verdict in self_test(CPU, weights):
        assert not verdict.faults and verdict.kernel == row.name, verdict


def of_format(*names: str, activation: str | None = None) -> list[tuple[str, QuantSpec]]:
    return [
        (name, spec) for name, spec in WEIGHTS if name in names and spec.activation == activation
    ]


if __name__ == "__main__":
    check(PackedGrid, cuda.CudaFragments, of_format("int", "nf4", "fp4"))
    check(PackedGrid, cuda_int8.CudaInt8, of_format("int8", activation="dynamic"))
    check(Fp8Grid, cuda_fp8.CudaFp8Weights, of_format("fp8"))
    check(Fp8Grid, cuda_fp8.CudaFp8, of_format("fp8", activation="dynamic"))
    check(SpqrGrid, cuda_spqr.CudaSpqr, of_format("spqr"))
    sys.stdout.write("all checks passed\n")
