"""The kernels for AMX on any processor with AVX-512: their few instructions emulated, the portable code gives the expected values."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from isas_program import CPU, FOLDER, build, check

from hfq.kernels import native

# Like add_isa() in kernels/wheel/cpu.cmake, without what is emulated.
FLAGS = (
    *("-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
)
# GCC's own headers read uninitialized variables on purpose.
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")


@pytest.mark.slow
def test_amx_agrees_with_the_portable_code(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or "avx512" not in native.load().isas:
        pytest.skip("needs g++ and a processor with AVX-512")
    isas = {
        FOLDER / "emulated_isas.cpp": (),
        CPU / "isa_generic.cpp": (),
        CPU / "isa_avx512.cpp": (*FLAGS, *QUIET),
        CPU / "isa_avx512_amx.cpp": (*FLAGS, *QUIET, "-include", str(FOLDER / "emulated_amx.h")),
    }
    check([str(build(tmp_path, [compiler], isas))], "avx512_amx")
