"""hfq on a GPU beside bfloat16 products of the matrix library. Checks that products are right before it times them.

    python benchmarks/gpu.py [--only kernels] [--kinds "int4 g128" "nf4 g64"] [--rounds 5]
    python benchmarks/gpu.py --dry-run    # all but the timing, on the CPU, with tiny sizes; writes nothing
    python benchmarks/gpu.py --plot       # draws results/gpu_*.json once more and judges them, measures nothing

Four parts, each a file and a JSON of its name (gpu_kernels.py, gpu_kernels.json, ...):

Kernels: whatever the dispatcher chooses for each format. Microseconds in a CUDA graph that goes through copies of the weight, more than
the L2 cache holds; packed bytes per second, and as a share of what device-to-device copies reach; the same product in bfloat16 in turn.
"Eager" is a call from Python, the next one queued behind it.
Gradients: dX of packed weights beside the same product with a dense bfloat16 weight.
Models: a Llama of 8B parameters with random weights. Tokens per second of greedy decoding, each step one CUDA graph over a cache of fixed
addresses, and of prompts.
Packing: from a bfloat16 weight on the device to codes and on to the kernel's layout; `from_pretrained` of a checkpoint.

The exit code is 1 where a product was wrong or raised.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import machine
import torch
from gpu_clock import Clock, CpuClock, CudaClock
from gpu_gradients import gradients
from gpu_kernels import kernels
from gpu_models import models
from gpu_packing import packing
from gpu_plan import FULL, TINY, Plan
from gpu_report import PICTURES, REPORTS, goals, report_goals
from gpu_weights import KINDS

# Environment variables, what changes the kernels that are taken, and what results are called that were measured so.
SWITCHES = {
    ("HFQ_CUDA_OVERLAP", "0"): "no-overlap",
    ("HFQ_CUDA_WGMMA", "0"): "no-wgmma",
    ("HFQ_CUDA_WGMMA", "shared"): "shared",
    ("HFQ_CUDA_WIDE", "0"): "no-wide",
    ("HFQ_CUDA_DIGITS", "1"): "digits",
}

PARTS: dict[str, Callable[[Clock, Plan], dict[str, Any]]] = {
    "kernels": kernels,
    "gradients": gradients,
    "models": models,
    "packing": packing,
}


def about_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def save(part: str, found: Mapping[str, Any], arguments: Sequence[str], plan: Plan) -> None:
    """A JSON of what a part found, and its pictures.

    Some formats alone, or with a switch, go into a JSON that is named after them and have no pictures: they replace nothing that was
    measured of all.
    """
    switched = {
        (switch, value): name
        for (switch, value), name in SWITCHES.items()
        if os.environ.get(switch) == value
    }
    formats = [] if plan.kinds == FULL.kinds else [kind.replace(" ", "-") for kind in plan.kinds]
    name = "_".join(["gpu", part, *formats, *switched.values()])
    command = shlex.join(["python", "benchmarks/gpu.py", *arguments])
    command = " ".join([*(f"{switch}={value}" for switch, value in switched), command])
    path = machine.write(name, command, {**about_gpu(), part: found})
    print(f"written: {path.name}")
    something = part != "models" or found["models"]  # all may have been left out
    if something and not formats and not switched:
        draw(part, found)


def failures(results: Mapping[str, Any]) -> int:
    """How many products were wrong or raised, and models were left out."""
    rows = [
        row for part in ("kernels", "gradients") for row in results.get(part, {"rows": ()})["rows"]
    ]
    return sum(bool(row["failure"]) for row in rows) + len(
        results.get("models", {"left_out": ()})["left_out"]
    )


def draw(part: str, found: Mapping[str, Any]) -> None:
    """The pictures that show a part, of which there may be none."""
    for file, (shown, picture) in PICTURES.items():
        if shown == part:
            path = machine.RESULTS / f"{file}.svg"
            path.write_text(picture(found), encoding="utf-8")
            print(f"drawn: {path.name}")


def draw_again() -> int:
    """Pictures and goals of all that was written before."""
    results = {}
    for part in PARTS:
        path = machine.RESULTS / f"gpu_{part}.json"
        if path.exists():
            results[part] = json.loads(path.read_text())[part]
            draw(part, results[part])
    report_goals(goals(results, FULL.large))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="formats; default: all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--compile", action="store_true", help="decode through torch.compile, too; takes minutes"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--plot", action="store_true", help="only draw what was measured before")
    args = parser.parse_args(arguments)
    if args.plot:
        return draw_again()
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "needs a CUDA device, and there is none here; --dry-run runs all but the timing on the CPU"
        )
        return 1
    plan = TINY if args.dry_run else FULL
    changed = {"kinds": args.kinds and tuple(args.kinds), "rounds": args.rounds}
    plan = replace(plan, compiled=args.compile, **{k: v for k, v in changed.items() if v})
    if args.kinds:
        plan = replace(plan, models=tuple(name for name in plan.models if name in args.kinds))
    clock: Clock = CpuClock() if args.dry_run else CudaClock()
    results: dict[str, Any] = {}
    for part in (args.only,) if args.only else PARTS:
        results[part] = PARTS[part](clock, plan)
        REPORTS[part](results[part])
        if not args.dry_run:
            save(part, results[part], sys.argv[1:] if arguments is None else arguments, plan)
        gc.collect()
        clock.free_bytes()
    report_goals(goals(results, plan.large))
    if args.dry_run:
        print("a dry run with tiny sizes: the numbers mean nothing")
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
