"""The NEON kernels, cross-compiled and run in an emulator: the portable code gives the expected values (check_isas.cpp)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "kernels" / "cpu"
PREFIX = "aarch64-linux-gnu"

# Like add_isa() in kernels/wheel/cpu.cmake.
FLAGS = {"isa_neon.cpp": ["-march=armv8.2-a+dotprod"]}
SOURCES = (
    *("isa.cpp", "isa_generic.cpp", "isa_neon.cpp"),
    *("launch.cpp", "launch_spqr.cpp", "launch_decode.cpp"),
)


@pytest.mark.slow
def test_neon_agrees_with_the_portable_code(tmp_path: Path) -> None:
    compiler, emulator = shutil.which(f"{PREFIX}-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip(f"needs {PREFIX}-g++ and qemu-aarch64 (Debian: g++-{PREFIX}, qemu-user)")
    objects = []
    for source in (*(CPU / name for name in SOURCES), Path(__file__).with_name("check_isas.cpp")):
        objects.append(tmp_path / f"{source.stem}.o")
        flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
        command = [compiler, *flags, "-DHFQ_WITH_NEON", *FLAGS.get(source.name, [])]
        subprocess.run([*command, "-c", str(source), "-o", str(objects[-1])], check=True)
    program = tmp_path / "check_isas"
    subprocess.run([compiler, "-static", *map(str, objects), "-o", str(program)], check=True)
    for seed in ("1", "2"):
        run = subprocess.run(
            [emulator, "-cpu", "max", str(program), seed],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "isas: neon,generic" in run.stdout
        cases = re.search(r"neon: (\d+) cases", run.stdout)
        assert cases is not None and int(cases[1]) > 400
