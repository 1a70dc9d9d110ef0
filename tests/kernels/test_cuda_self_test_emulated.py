"""The self-test of `hfq doctor` with the CUDA kernels, on the emulated GPU."""

from __future__ import annotations

from typing import Any


def test_kernels_pass(emulator: Any, emulator_module: Any) -> None:
    emulator_module.check_operators(emulator.folder, "check_self_test.py")
