"""Whole models with the CUDA kernels, and the self-test of `hfq doctor`, on the emulated GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_emulator import check_operators

# Each takes ten seconds.
SLOW = ("nf4", "int8", "fp8", "fp8 both", "fp8 widened", "spqr")


@pytest.mark.parametrize(
    "case",
    ["int", "experts", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_model_generates(emulator: Any, tmp_path: Path, case: str) -> None:
    check_operators(emulator.folder, "check_model.py", case, str(tmp_path))


def test_self_test(emulator: Any) -> None:
    check_operators(emulator.folder, "check_doctor.py")
