"""check_isas.cpp with the kernels of some instruction sets, compiled and run: what test_neon.py and test_amx_emulated.py share."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
CPU = FOLDER.parents[1] / "kernels" / "cpu"
LAUNCHERS = ("launch.cpp", "launch_spqr.cpp", "launch_decode.cpp")


def build(
    folder: Path,
    compiler: Sequence[str],
    isas: Mapping[Path, Sequence[str]],
    linker_flags: Sequence[str] = (),
) -> Path:
    """The program, from the files of instruction sets with each one's flags."""
    sources = {
        **isas,
        **{CPU / name: () for name in LAUNCHERS},
        FOLDER / "check_isas.cpp": (),
    }
    objects = []
    for source, own in sources.items():
        objects.append(folder / f"{source.stem}.o")
        flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *own]
        command = [*compiler, *flags, "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    program = folder / "check_isas"
    command = [*compiler, *linker_flags, *map(str, objects), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def check(command: Sequence[str], name: str) -> None:
    """Runs the program twice, with other numbers; `name` has to be among what it compared."""
    for seed in ("1", "2"):
        run = subprocess.run([*command, seed], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        assert f"isas: {name},generic" in run.stdout
        cases = re.search(rf"{name}: (\d+) cases", run.stdout)
        assert cases is not None and int(cases[1]) > 400
