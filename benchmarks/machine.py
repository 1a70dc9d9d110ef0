"""What a result was measured with, and where results are kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from hfq.diagnose.machine import cpu_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "hfq", "bitsandbytes", "hqq", "peft")


def describe() -> dict[str, Any]:
    """Machine, threads and versions."""
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def write(name: str, command: str, results: dict[str, Any]) -> Path:
    """``benchmarks/results/<name>.json``, with the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"command": command, "machine": describe(), **results}, indent=2) + "\n"
    )
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
