"""The GPU benchmark, but for its timing: a dry run on the CPU goes through all parts, tables, goals and pictures."""

from __future__ import annotations

import importlib
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "machine",
    "gpu_clock",
    "gpu_weights",
    "gpu_plan",
    "gpu_llama",
    "gpu_kernels",
    "gpu_gradients",
    "gpu_models",
    "gpu_packing",
    "gpu_report",
    "gpu",
)


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """The script as a module; its neighbours are found as they are when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gpu")
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all() -> Iterator[None]:
    """For tiny tensors: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(gpu: ModuleType) -> dict[str, Any]:
    return {part: measure(gpu.CpuClock(), gpu.TINY) for part, measure in gpu.PARTS.items()}


def test_without_a_gpu_it_says_so(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "needs a CUDA device" in said[0]


def test_all_products_are_right(gpu: ModuleType, results: dict[str, Any]) -> None:
    rows = results["kernels"]["rows"]
    plan = gpu.TINY
    assert len(rows) == len(plan.kinds) * len(plan.shapes) * len(plan.tokens)
    assert gpu.failures(results) == 0
    assert {row["weights"] for row in rows} == set(gpu.KINDS)
    for row in rows:
        assert row["kernel"] and row["relative_error"] < gpu.KINDS[row["weights"]].bound
        for number in ("microseconds", "GB_per_second", "ratio_to_bfloat16", "share_of_copy"):
            assert math.isfinite(row[number]) and row[number] > 0


def test_models_and_packing(gpu: ModuleType, results: dict[str, Any]) -> None:
    found = results["models"]
    assert set(found["models"]) == {"bfloat16", *gpu.TINY.models} and not found["left_out"]
    tasks = importlib.import_module("gpu_models").tasks_of(gpu.TINY)
    for one in found["models"].values():
        assert set(one["tokens_per_second"]) == set(tasks)
    assert (
        found["models"]["int4 g128"]["weight_bytes"] < found["models"]["bfloat16"]["weight_bytes"]
    )
    packed = {row["weights"]: row for row in results["packing"]["weights"]}
    assert set(packed) == set(gpu.KINDS)
    assert packed["int8 g128"]["relative_error_of_weights"] < 0.01
    assert set(results["packing"]["loading"]["seconds"]) == {"bfloat16", *gpu.TINY.models[:2]}


def test_wrong_products_are_failures(
    gpu: ModuleType, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, packed = gpu.CpuClock(), importlib.import_module("gpu_weights").Packed
    for change in (lambda y: y * 1.1, lambda y: torch.full_like(y, torch.nan)):
        linear = packed.linear
        with monkeypatch.context() as patch:
            patch.setattr(packed, "linear", lambda self, x, f=change, g=linear: f(g(self, x)))
            plan = gpu.replace(gpu.TINY, kinds=("int4 g128",), tokens=(1,))
            found = {"kernels": gpu.kernels(clock, plan), "gradients": gpu.gradients(clock, plan)}
        assert all(row["failure"] for part in found.values() for row in part["rows"])
        assert gpu.failures(found) == 3
        goals = gpu.goals(found, plan.large)
        assert goals[0].verdict == "MISSED" and goals[-1].verdict == "not measured"


def test_a_report_and_pictures_of_it_all(
    gpu: ModuleType, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for part, report in gpu.REPORTS.items():
        report(results[part])
    goals = gpu.goals(results, gpu.TINY.large)
    gpu.report_goals(goals)
    said = capsys.readouterr().out
    assert all(name in said for name in (*gpu.KINDS, "tokens/s", "from_pretrained"))
    assert len(goals) == 7 and all(goal.found is not None for goal in goals)
    assert {goal.verdict for goal in goals} <= {"met", "MISSED"}
    for part, picture in gpu.PICTURES.values():
        ElementTree.fromstring(picture(results[part]))


def test_the_program(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu.machine, "RESULTS", tmp_path)
    arguments = ["--dry-run", "--only", "kernels", "--kinds", "nf4 g64", "--rounds", "2"]
    assert gpu.main(arguments) == 0
    said = capsys.readouterr().out
    assert "nf4 g64" in said and "int4 g128" in said and "not measured" in said
    assert not list(tmp_path.iterdir())
    assert gpu.main(["--plot"]) == 0


def test_what_is_written_is_drawn_and_judged_again(
    gpu: ModuleType,
    results: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu.machine, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "about_gpu", dict)
    monkeypatch.setattr(gpu, "FULL", gpu.TINY)
    for part in gpu.PARTS:
        gpu.save(part, results[part], ["--only", part], gpu.TINY)
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert set(pictures) == {f"{name}.svg" for name in gpu.PICTURES}
    assert {path.stem for path in tmp_path.glob("*.json")} == {f"gpu_{part}" for part in gpu.PARTS}
    gpu.save("kernels", results["kernels"], [], gpu.replace(gpu.TINY, kinds=("nf4 g64",)))
    assert (tmp_path / "gpu_kernels_nf4-g64.json").exists()
    with monkeypatch.context() as patch:
        patch.setenv("HFQ_CUDA_OVERLAP", "0")
        gpu.save("kernels", results["kernels"], ["--rounds", "1"], gpu.TINY)
    written = json.loads((tmp_path / "gpu_kernels_no-overlap.json").read_text())
    assert written["command"] == "HFQ_CUDA_OVERLAP=0 python benchmarks/gpu.py --rounds 1"
    capsys.readouterr()
    assert gpu.main(["--plot"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == pictures
    assert "not measured" not in capsys.readouterr().out
