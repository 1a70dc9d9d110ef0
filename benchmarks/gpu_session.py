"""All that a GPU has to show, what matters most first: for a machine that is there for minutes at a time.

    python benchmarks/gpu_session.py OUT                      # every step, each once: build, tests, speed, sanitizers
    python benchmarks/gpu_session.py OUT --minutes 9          # as many as fit; called again, it goes on
    python benchmarks/gpu_session.py OUT --only doctor tests  # these, done or not
    python benchmarks/gpu_session.py OUT --table              # runs nothing

OUT gets the log of each step, ``session.json`` and the JSON of all that was measured (benchmarks/results keeps its own). A step that takes
five times as long as it should, or all the time that is left, is stopped and counts as cut off: a kernel may hang. It is not run again
unless --only names it. Steps that do not fit into the minutes that are left wait for the next call. The exit code is 1 where a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import machine

from hfq.table import format_table

ROOT = Path(__file__).parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
BENCHMARK = (sys.executable, "benchmarks/gpu.py")
INT4, NF4 = ("--kinds", "int4 g128"), ("--kinds", "nf4 g64")
NO_WGMMA, NO_WIDE, NO_OVERLAP = ({f"HFQ_CUDA_{name}": "0"} for name in ("WGMMA", "WIDE", "OVERLAP"))


@dataclass(frozen=True)
class Step:
    """One command, run from the checkout.

    Attributes:
        seconds: about what it takes. With fewer left it waits; after five times as many it is stopped.
        environment: variables beside those that are set already.
        makes: a file of the checkout. Where it is missing the step is run again though it is done: OUT may come from another machine.
    """

    name: str
    seconds: int
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    makes: Path | None = None


def steps() -> list[Step]:
    """In their order. One format comes before all of them, and alone again with each switch off."""
    clusters, rates = (
        str(Path(tempfile.gettempdir()) / name) for name in ("gpu_clusters", "gpu_rates")
    )
    hopper = ("-gencode", "arch=compute_90a,code=sm_90a", "-I", "kernels/cuda")
    return [
        Step(
            "build",
            90,
            ("scripts/build_native", f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}"),
            makes=ROOT / "hfq/lib/libhfq_cuda.so",
        ),
        # Each rung in a process of its own: kernels whose barriers are wrong hang, and a fault would fail every later test.
        Step("wgmma ladder", 120, (sys.executable, "tests/kernels/wgmma_ladder.py")),
        Step("doctor", 40, (sys.executable, "-m", "hfq", "doctor")),
        # What plans count on.
        Step(
            "clusters",
            20,
            ("nvcc", "-arch=native", "-run", "-o", clusters, "benchmarks/gpu_clusters.cu"),
        ),
        Step(
            "rates",
            20,
            ("nvcc", "-std=c++17", "-O3", *hopper, "-run", "-o", rates, "benchmarks/gpu_rates.cu"),
        ),
        Step("tests", 180, (*PYTEST, "-m", "gpu", "tests")),
        Step("int4", 20, (*BENCHMARK, "--only", "kernels", *INT4)),
        Step("model", 30, (*BENCHMARK, "--only", "models", *INT4)),
        Step("kernels", 90, (*BENCHMARK, "--only", "kernels")),
        Step("models", 120, (*BENCHMARK, "--only", "models")),
        Step("int4 no overlap", 20, (*BENCHMARK, "--only", "kernels", *INT4), NO_OVERLAP),
        Step("int4 no wgmma", 20, (*BENCHMARK, "--only", "kernels", *INT4), NO_WGMMA),
        Step("int4 no wide", 20, (*BENCHMARK, "--only", "kernels", *INT4), NO_WIDE),
        Step(
            "int4 shared",
            20,
            (*BENCHMARK, "--only", "kernels", *INT4),
            {"HFQ_CUDA_WGMMA": "shared"},
        ),
        Step("nf4 digits", 20, (*BENCHMARK, "--only", "kernels", *NF4), {"HFQ_CUDA_DIGITS": "1"}),
        Step("model no overlap", 30, (*BENCHMARK, "--only", "models", *INT4), NO_OVERLAP),
        *sanitizer("memcheck"),
        *sanitizer("synccheck"),
        *sanitizer("racecheck"),
        Step("gradients", 60, (*BENCHMARK, "--only", "gradients")),
        Step("packing", 120, (*BENCHMARK, "--only", "packing")),
        *sanitizer("initcheck"),
    ]


def sanitizer(tool: str) -> Iterator[Step]:
    """A step for each file with tests for a GPU: together they take longer than a machine may be there."""
    for path in sorted(ROOT.glob("tests/kernels/test_*.py")):
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8"):
            run = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST)
            # -x: the first report is the one to read. But initcheck has one for each flag that wait_for_flag (kernels/cuda/ptx.h) reads before it is raised.
            first = () if tool == "initcheck" else ("-x",)
            command = (*run, *first, "-m", "gpu and not large", str(path.relative_to(ROOT)))
            yield Step(f"{tool} {path.stem.removeprefix('test_')}", 60, command)


def architecture() -> str:
    """What nvcc builds for the first GPU here; Hopper has instructions that only its own code may use."""
    import torch

    if not torch.cuda.is_available():
        return "90a-real"
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"


# ---- running


class Session:
    """What was done so far, kept in a file of OUT so that a later call goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "session.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.done = json.loads(self.file.read_text(encoding="utf-8"))

    def has(self, step: Step) -> bool:
        """Whether it was run, whatever came of it."""
        return step.name in self.done and (step.makes is None or step.makes.exists())

    def run(self, step: Step, left: float | None) -> None:
        """Run a step and write down what came of it; `left`: seconds until the session ends, None if it does not."""
        limit = max(10.0, 5 * step.seconds)
        if left is not None:
            limit = min(limit, left)
        print(f"{step.name}: {shlex.join(step.command)}", flush=True)
        log = self.folder / f"{step.name.replace(' ', '_')}.log"
        start = time.perf_counter()
        with log.open("wb") as output:
            try:
                status = self._status(step, limit, output)
            except OSError as error:  # no such program
                output.write(str(error).encode())
                status = "FAILED"
        self.done[step.name] = {
            "status": status,
            "seconds": round(time.perf_counter() - start, 1),
            "said": last_line(log),
        }
        self.file.write_text(json.dumps(self.done, indent=2) + "\n", encoding="utf-8")
        for path in machine.RESULTS.glob("gpu_*.json"):
            (self.folder / path.name).write_bytes(path.read_bytes())

    @staticmethod
    def _status(step: Step, limit: float, output: IO[bytes]) -> str:
        """Of a step that was run to its end, or for `limit` seconds."""
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **step.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it starts is stopped with it
        )
        try:
            return "ok" if process.wait(limit) == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "cut off"

    def table(self, names: Sequence[str]) -> str:
        """A row for each step, with the last line that it wrote."""
        rows = []
        for name in names:
            found = self.done.get(name, {"status": "not run", "seconds": "", "said": ""})
            rows.append([name, found["status"], str(found["seconds"]), found["said"]])
        return format_table(["step", "status", "seconds", "said"], rows)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, help="stop in time")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, done or not")
    parser.add_argument("--table", action="store_true", help="only show what was done")
    args = parser.parse_args(arguments)
    known = {step.name: step for step in steps()}
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        parser.error(f"unknown steps {', '.join(unknown)}; there are {', '.join(known)}")
    session = Session(args.out)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    wanted = args.only or [name for name, step in known.items() if not session.has(step)]
    for step in (known[name] for name in ([] if args.table else wanted)):
        left = None if end is None else end - time.monotonic()
        if left is None or left >= step.seconds:
            session.run(step, left)
    print(session.table(list(known)))
    return 1 if any(found["status"] == "FAILED" for found in session.done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
