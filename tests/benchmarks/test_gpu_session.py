"""The session on a GPU, with commands that need none: order, time, what is kept between calls."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def session() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gpu_session")
        for name in ("machine", "gpu_session"):
            patch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def use_steps(
    session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Steps of (name, seconds, Python code); results of earlier runs are not copied."""

    def use(*steps: tuple[str, int, str], **fields: Any) -> None:
        made = [
            session.Step(name, seconds, (sys.executable, "-c", code), **fields)
            for name, seconds, code in steps
        ]
        monkeypatch.setattr(session, "steps", lambda: made)
        monkeypatch.setattr(session.machine, "RESULTS", tmp_path / "results")

    return use


def done(folder: Path) -> dict[str, str]:
    kept = json.loads((folder / "session.json").read_text())
    return {name: found["status"] for name, found in kept.items()}


def test_each_step_once_and_failures_are_told(
    session: ModuleType,
    use_steps: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    use_steps(("good", 1, "print('all\\n  12 passed\\n')"), ("bad", 1, "raise SystemExit(3)"))
    assert session.main([str(out)]) == 1
    assert done(out) == {"good": "ok", "bad": "FAILED"}
    assert "12 passed" in capsys.readouterr().out
    assert (out / "good.log").read_text().startswith("all")
    use_steps(("good", 1, "raise SystemExit(1)"), ("bad", 1, ""), ("new", 1, ""))
    assert session.main([str(out)]) == 1
    assert done(out) == {"good": "ok", "bad": "FAILED", "new": "ok"}
    assert session.main([str(out), "--only", "bad"]) == 0
    assert done(out)["bad"] == "ok"


def test_a_program_that_is_not_there_is_a_failure(
    session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [session.Step("compiler", 1, ("no-such-program",))]
    monkeypatch.setattr(session, "steps", lambda: steps)
    monkeypatch.setattr(session.machine, "RESULTS", tmp_path / "results")
    assert session.main([str(tmp_path)]) == 1
    assert done(tmp_path) == {"compiler": "FAILED"}
    assert "no-such-program" in (tmp_path / "compiler.log").read_text()


def test_steps_that_do_not_fit_wait(
    session: ModuleType,
    use_steps: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_steps(("long", 600, "print('never')"), ("short", 1, ""))
    assert session.main([str(tmp_path), "--minutes", "1"]) == 0
    assert done(tmp_path) == {"short": "ok"}
    assert "not run" in capsys.readouterr().out


def test_what_takes_too_long_is_cut_off_with_all_that_it_started(
    session: ModuleType, use_steps: Callable[..., None], tmp_path: Path
) -> None:
    sleeping = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    use_steps(("slow", 0, sleeping))
    for time in (["--minutes", "0.05"], ["--only", "slow"]):
        assert session.main([str(tmp_path), *time]) == 0
        kept = json.loads((tmp_path / "session.json").read_text())["slow"]
        assert kept["status"] == "cut off" and kept["said"] == "begun" and kept["seconds"] < 30


def test_environment_and_what_a_step_makes(
    session: ModuleType, use_steps: Callable[..., None], tmp_path: Path
) -> None:
    makes = tmp_path / "library"
    code = f"import os; assert os.environ['SWITCH'] == '1'; open({str(makes)!r}, 'a').write('x')"
    use_steps(("build", 1, code), environment={"SWITCH": "1"}, makes=makes)
    for expected in ("x", "x"):
        assert session.main([str(tmp_path)]) == 0
        assert makes.read_text() == expected
    makes.unlink()
    assert session.main([str(tmp_path)]) == 0
    assert makes.exists()


def test_the_steps_name_what_is_there(
    session: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    steps = session.steps()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert f"{tool} cuda" in names
    for step in steps:
        for word in step.command:
            if word.startswith(("tests/", "benchmarks/", "scripts/")):
                assert (BENCHMARKS.parent / word).exists(), word
    assert session.main([str(tmp_path), "--table"]) == 0
    assert capsys.readouterr().out.count("not run") == len(names)
    with pytest.raises(SystemExit):
        session.main([str(tmp_path), "--only", "nothing"])
