"""The NEON kernels, cross-compiled and run in an emulator: the portable code gives the expected values (check_isas.cpp)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from isas_program import CPU, build, check

PREFIX = "aarch64-linux-gnu"

# Like add_isa() in kernels/wheel/cpu.cmake.
FLAGS = ("-march=armv8.2-a+dotprod",)


@pytest.mark.slow
def test_neon_agrees_with_the_portable_code(tmp_path: Path) -> None:
    compiler, emulator = shutil.which(f"{PREFIX}-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip(f"needs {PREFIX}-g++ and qemu-aarch64 (Debian: g++-{PREFIX}, qemu-user)")
    isas = {CPU / "isa.cpp": (), CPU / "isa_generic.cpp": (), CPU / "isa_neon.cpp": FLAGS}
    program = build(tmp_path, [compiler, "-DHFQ_WITH_NEON"], isas, ["-static"])
    check([emulator, "-cpu", "max", str(program)], "neon")
