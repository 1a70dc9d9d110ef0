"""The CUDA kernels for each architecture: they compile, and no kernel runs out of registers (that needs no GPU)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "kernels/cuda"
# Run once or more for each weight of a model: a spill costs memory traffic where memory is the limit.
PATTERNS = (
    *(
        "linear_*.cu",
        "gemm_int*.cu",
        "gemm_table*.cu",
        "spqr_linear?.cu",
        "spqr_experts?.cu",
        "spqr_gemm*.cu",
    ),
    *(
        "experts_*.cu",
        "wgmma_*.cu",
        "wide_*.cu",
        "*unpack.cu",
        "unpack_bytes.cu",
        "round_weights.cu",
        "to_fragments.cu",
        "quantize_tokens.cu",
        "scale_sums.cu",
        "attend.cu",
        "decode.cu",
    ),
)
HOT = sorted(path.name for pattern in PATTERNS for path in CUDA.glob(pattern))
# Of each family the one with the fewest registers to spare, for every run.
CLOSE = ("linear_int3.cu", "gemm_table4.cu", "spqr_linear3.cu", "wide_int4.cu")
# wgmma kernels whose warps take registers from others: tokens, WgmmaWay, registers.
TAKEN = [(64, 0, 96), (64, 2, 96), (128, 4, 168), (256, 4, 168)]

# What kernels/wheel/cuda.cmake compiles from PTX for another GPU, and what it does not: code for 9.0a alone, and of what asks for 8.9.
SHARED = sorted(
    path.name
    for path in CUDA.glob("*.cu")
    if not path.match("wgmma_*.cu") and not path.match("wide_*.cu")
)
ASKS_FOR_89 = {"linear_fp8.cu"}
ASKS_FOR_NONE = {
    path.name
    for pattern in (
        "gemm*",
        "spqr_gemm*",
        "*unpack*",
        "round_weights",
        "scale_sums",
        "to_fragments",
    )
    for path in CUDA.glob(f"{pattern}.cu")
}


def _nvcc(target: str) -> str:
    """Skips where it is not there, or does not know GPUs such as sm_90a."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    if target.removesuffix("a") not in known.stdout:
        pytest.skip(f"this nvcc does not know {target}")
    return nvcc


def _entries(source: str, architecture: str, folder: Path) -> dict[str, str]:
    """What ptxas says of each kernel of a file."""
    # Options of kernels/wheel/cuda.cmake.
    command = [
        _nvcc(architecture),
        "-std=c++17",
        "-O3",
        f"-arch={architecture}",
        f"-I{CUDA}",
        "-cubin",
        "-Xptxas",
        "-v",
    ]
    run = subprocess.run(
        [*command, str(CUDA / source), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # Where ptxas cannot follow what wgmma has on the way, it waits for each instruction.
    assert "wgmma" not in re.sub(r"wgmma_\w+", "", run.stderr), run.stderr
    assert "warpgroup" not in run.stderr and "setmaxnreg" not in run.stderr, run.stderr
    entries = re.split(r"Compiling entry function ", run.stderr)[1:]
    return {entry.split()[0]: entry for entry in entries}


def _spills(entries: dict[str, str]) -> dict[str, int]:
    """Bytes that each kernel stores to and loads from memory for want of registers."""
    spills = {}
    for name, entry in entries.items():
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        assert found is not None, entry
        spills[name] = int(found[1]) + int(found[2])
    return spills


def _check(source: str, architecture: str, folder: Path) -> None:
    entries = _entries(source, architecture, folder)
    spills = _spills(entries)
    assert spills, "no kernel in the output of ptxas"
    assert not any(spills.values()), spills
    if any("wgmma_kernel" in name for name in entries) and architecture == "sm_90a":
        _check_registers(entries, TAKEN, 2)


def _check_registers(
    entries: dict[str, str], taken: list[tuple[int, int, int]], dtypes: int
) -> None:
    """Warps that take registers from others wait forever if a launch has fewer than they count on (kAtFirst, wgmma_staged.h)."""
    for tokens, way, registers in taken:
        kernel = f"ELi{tokens}ELNS0_8WgmmaWayE{way}E"
        own = [entry for name, entry in entries.items() if kernel in name]
        assert len(own) == dtypes, list(entries)
        assert all(f"Used {registers} registers" in entry for entry in own), own


def test_wgmma_has_the_registers_that_it_counts_on(tmp_path: Path) -> None:
    """Of wgmma_int3.cu, which has the fewest to spare, one dtype of those that count."""
    ways = [f"{tokens}, static_cast<WgmmaWay>({way})" for tokens, way, _ in TAKEN]
    ways.append(
        "16, WgmmaWay::kStagedHalf"
    )  # two blocks of a multiprocessor: half of the registers
    kernels = [
        f"template __global__ void wgmma_kernel<IntCodes<3>, BFloat16, {way}>(WgmmaParams);\n"
        for way in ways
    ]
    source = tmp_path / "kernels.cu"
    source.write_text(
        '#include "wgmma_kernel.h"\nnamespace hfq {\nnamespace {\n' + "".join(kernels) + "}\n}\n"
    )
    entries = _entries(str(source), "sm_90a", tmp_path)
    assert not any(_spills(entries).values()), entries
    _check_registers(entries, TAKEN, 1)


@pytest.mark.parametrize("source", CLOSE)
def test_the_closest_kernels_need_no_more_registers_than_there_are(
    tmp_path: Path, source: str
) -> None:
    _check(source, "sm_90a", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("source", HOT)
def test_no_kernel_needs_more_registers_than_there_are(
    tmp_path: Path, source: str, architecture: str
) -> None:
    _check(source, architecture, tmp_path)


def _ptx(source: str, number: str, folder: Path) -> list[str]:
    """Its lines, but for those that name what it was made for."""
    target = folder / f"{number}.ptx"
    command = [_nvcc(f"sm_{number}"), "-std=c++17", "-O3", f"-arch=compute_{number}", "-ptx"]
    subprocess.run([*command, str(CUDA / source), "-o", str(target)], check=True)
    return [line for line in target.read_text().splitlines() if not line.startswith(".target")]


@pytest.mark.slow
@pytest.mark.parametrize("source", SHARED)
def test_gpus_share_the_ptx_that_is_the_same(tmp_path: Path, source: str) -> None:
    of_80, of_90 = _ptx(source, "80", tmp_path), _ptx(source, "90", tmp_path)
    assert of_90 == _ptx(source, "90a", tmp_path)
    assert (of_80 != _ptx(source, "89", tmp_path)) == (source in ASKS_FOR_89)
    assert of_80 == of_90 or source not in ASKS_FOR_NONE
