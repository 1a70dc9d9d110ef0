"""The build: what is installed, with and without a compiler, and the rules that keep the sources portable."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import hfq
from hfq.kernels import native

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"


def _configure(
    build: Path, path: str, *options: str, **environment: str
) -> dict[str, dict[str, object]]:
    """Run cmake's configuration step with PATH=`path` and return build_info.json."""
    cmake = shutil.which("cmake")
    make = shutil.which("ninja") or shutil.which("make")
    if cmake is None or make is None:
        pytest.skip("needs cmake and ninja or make")
    generator = "Ninja" if make.endswith("ninja") else "Unix Makefiles"
    command = [cmake, "-S", str(KERNELS / "wheel"), "-B", str(build), "-G", generator]
    unset = {"CC", "CXX", "CUDACXX", "HFQ_CPU", "HFQ_CUDA"}
    run = subprocess.run(
        [*command, f"-DCMAKE_MAKE_PROGRAM={make}", *options],
        env={k: v for k, v in os.environ.items() if k not in unset} | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    info: dict[str, dict[str, object]] = json.loads((build / "build_info.json").read_text())
    return info


def test_without_a_compiler_the_wheel_is_still_built(tmp_path: Path) -> None:
    info = _configure(tmp_path / "build", str(tmp_path))
    assert info["cpu"]["built"] is False
    assert info["cpu"]["reason"] == "no C++ compiler was found when hfq was installed"
    assert info["cpu"]["isas"] == []
    assert info["cuda"]["built"] is False
    assert "needs a C++ compiler" in str(info["cuda"]["reason"])


def test_native_code_can_be_switched_off(tmp_path: Path) -> None:
    info = _configure(tmp_path / "build", os.environ["PATH"], HFQ_CPU="OFF")
    assert (info["cpu"]["built"], info["cpu"]["reason"]) == (False, "HFQ_CPU=OFF")


def test_cuda_can_be_switched_off(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    for options, environment in ((["-DHFQ_CUDA=OFF"], {}), ([], {"HFQ_CUDA": "OFF"})):
        build = tmp_path / f"build{len(environment)}"
        info = _configure(build, os.environ["PATH"], *options, **environment)
        assert info["cpu"]["built"] is True
        assert (info["cuda"]["built"], info["cuda"]["reason"]) == (False, "HFQ_CUDA=OFF")


def test_a_reason_of_whoever_switches_cuda_off_is_kept(tmp_path: Path) -> None:
    """The second try of `pip install`, after nvcc has failed."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (again,) = project["tool"]["scikit-build"]["overrides"]
    defines = again["cmake"]["define"]
    assert again["if"] == {"failed": True} and defines["HFQ_CUDA"] == "OFF"
    options = [f"-D{name}={value}" for name, value in defines.items()]
    info = _configure(tmp_path / "build", os.environ["PATH"], *options)
    assert (info["cpu"]["built"], info["cuda"]["built"]) == (True, False)
    assert info["cuda"]["reason"] == defines["HFQ_CUDA_REASON"]


def test_a_compiler_that_was_not_there_before_is_found(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    for path, built in ((str(tmp_path), False), (os.environ["PATH"], True)):
        info = _configure(tmp_path / "build", path, HFQ_CUDA="OFF")
        assert info["cpu"]["built"] is built


def test_nvcc_need_not_be_on_the_path(tmp_path: Path) -> None:
    toolkits = [path for path in Path("/usr/local").glob("cuda*") if (path / "bin/nvcc").is_file()]
    if not toolkits or shutil.which("c++", path="/usr/bin:/bin") is None:
        pytest.skip("needs a CUDA toolkit in /usr/local and a C++ compiler")
    info = _configure(tmp_path / "build", "/usr/bin:/bin", CUDA_HOME=str(toolkits[0]))
    assert info["cuda"]["built"] is True, info["cuda"]["reason"]


@pytest.fixture(scope="module")
def configured_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a build that knows its compilers after the first time."""
    return tmp_path_factory.mktemp("again")


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("8.6\n8.6\n", []),
        ("9.0\n12.0\n", ["120-real"]),
        ("8.7\n", ["87-real"]),
        ("99.9\n", []),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.5\n",
            [],
        ),
        ("7.5\n", None),
        ("7.5\n8.0\n", []),
    ],
)
def test_code_for_the_gpus_of_the_machine(
    configured_again: Path, found: str, wanted: list[str] | None
) -> None:
    """What the driver would compile for minutes when it is first used; none where no GPU could run it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    smi = configured_again / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(f"#!/bin/sh\nprintf '{found}'\n")
    smi.chmod(0o755)
    path = f"{smi.parent}{os.pathsep}{os.environ['PATH']}"
    info = _configure(configured_again / "build", path)["cuda"]
    if wanted is None:
        assert info["built"] is False and "8.0, which no GPU of the machine had" in str(
            info["reason"]
        )
        return
    archs = info["archs"]
    assert isinstance(archs, list) and "80-real" in archs and "90-virtual" in archs
    expected = [arch for arch in wanted if f"sm_{arch.removesuffix('-real')}" in known.stdout]
    assert archs[archs.index("90-virtual") + 1 :] == expected


def test_exported_symbols_are_ours() -> None:
    """An exported C++ symbol could be merged with one of another library."""
    nm = shutil.which("nm")
    if nm is None or not native.load().cpu:
        pytest.skip("needs nm and the native library")
    library = next(p for f in hfq.__path__ if (p := Path(f) / "lib" / "libhfq_cpu.so").is_file())
    run = subprocess.run(
        [nm, "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in run.stdout.splitlines()}
    ours = {"hfq_cpu_isa", "hfq_cpu_isas", "hfq_cpu_registered", "hfq_cpu_select_isa"}
    assert {name for name in exported if "hfq" in name} == ours


@pytest.mark.parametrize("source", sorted(KERNELS.glob("cpu/isa_*.cpp")), ids=lambda p: p.stem)
def test_instruction_set_files_share_no_inline_code(source: Path) -> None:
    """The linker keeps one copy of an inline function: it may be the AVX-512 one. See kernels/cpu/rows16.h."""
    text = source.read_text()
    outside = text.split("namespace {")[0]
    includes = re.findall(r'#include ["<](.+)[">]', outside)
    assert set(includes) <= {
        "arm_neon.h",
        "decode.h",
        "immintrin.h",
        "moments.h",
        "rounding.h",
        "rows16.h",
        "spqr.h",
    }
    anonymous = text.split("namespace {")[1].split("}  // namespace\n")[0]
    # Those for VNNI and AMX only add to another.
    whole = (
        *("rows16_body.h", "e4m3_body.h", "int8_body.h"),
        *("spqr_body.h", "rounding_body.h", "decode_body.h"),
    )
    bodies = whole if "Kernels = {" in text else ()
    assert all(f'#include "{body}"' in anonymous for body in bodies)
    for inner in (*bodies, *re.findall(r'#include "(lanes_.+)"', anonymous)):
        assert "#include" not in (KERNELS / "cpu" / inner).read_text()
    common = ("common/decode.h", "common/dtype.h")
    names = ("rows16.h", "spqr.h", "rounding.h", "moments.h", "decode.h")
    for shared in (*common, *(f"cpu/{name}" for name in names)):
        text = (KERNELS / shared).read_text()
        assert not re.search(r"^(template|inline|static)\b", text, re.MULTILINE)


def test_kernel_builder_lists_every_source() -> None:
    build = tomllib.loads((KERNELS / "build.toml").read_text())
    listed = {
        *build["torch"]["src"],
        *(src for part in build["kernel"].values() for src in part["src"]),
    }
    on_disk = {
        str(path.relative_to(KERNELS))
        for folder in ("common", "cpu", "cuda", "torch-ext")
        for path in (KERNELS / folder).iterdir()
        if path.suffix in {".cpp", ".cu", ".h"}
    }
    assert listed == on_disk


def test_kernels_folder_is_no_package() -> None:
    """From the root of a checkout it would hide the `kernels` package of Hugging Face."""
    assert not (KERNELS / "__init__.py").exists()
