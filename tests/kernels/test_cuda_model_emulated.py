"""Whole models with the CUDA kernels, and the self-test of `hfq doctor`, on the emulated GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# Each takes ten seconds.
SLOW = ("nf4", "int8", "fp8", "fp8 both", "spqr")


@pytest.mark.parametrize(
    "case",
    ["int", "experts", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_model_generates(emulator: Any, emulator_module: Any, tmp_path: Path, case: str) -> None:
    emulator_module.check_operators(emulator.folder, "check_model.py", case, str(tmp_path))


def test_self_test(emulator: Any, emulator_module: Any) -> None:
    emulator_module.check_operators(emulator.folder, "check_doctor.py")
