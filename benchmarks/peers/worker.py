"""What the workers of `benchmarks/cpu.py` share; no package is needed."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

PROMPT = 128  # tokens before those that are decoded


def serve(measure: Callable[[str, int, int], float], about: dict[str, Any]) -> None:
    """Say what was loaded, then answer "TASK BATCH TOKENS" with {"seconds": ...} until the input ends; last, the peak."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        task, batch, tokens = line.split()
        print(json.dumps({"seconds": measure(task, int(batch), int(tokens))}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"peak_MiB": peak}), flush=True)
