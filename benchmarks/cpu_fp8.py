"""Format fp8 on the CPU beside 8-bit integers, and beside what it was without native code. Checks that products are right before it times them.

    python benchmarks/cpu_fp8.py [--rounds 5]

Milliseconds of a product of bfloat16 activations, by the kernel rows that a model would use: integers with float activations (`exact`), E4M3 with
float activations, E4M3 on both sides, and the last two with weights that PyTorch dequantizes in each call. Weights come from memory, and all take turns.
The median is beside the least of all: on a machine that is shared with others it says more.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

# (N, K).
SHAPES = ((4096, 4096), (4096, 14336))
TOKENS = (1, 8, 64, 512)
# Bytes of weights that a kernel goes through in turn, so that none is in a cache: this processor's third level holds 260 MiB.
ROTATED = 640 << 20
INT8, FP8, BOTH = "int8 exact", "fp8 weights", "fp8 dynamic"
BEFORE = {FP8: "fp8 weights, before", BOTH: "fp8 dynamic, before"}
NAMES = (INT8, FP8, BOTH, *BEFORE.values())


def grids(n: int, k: int) -> dict[str, Any]:
    """The same random weight in both formats, as stored."""
    import torch

    from hfq.core import affine
    from hfq.core.spec import Fp8Spec, Int8Spec
    from hfq.formats import FORMATS

    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    found = {}
    for name, format_name, spec in (
        (INT8, "int8", Int8Spec()),
        (FP8, "fp8", Fp8Spec()),
        (BOTH, "fp8", Fp8Spec(activation="dynamic")),
    ):
        packed = FORMATS.get(format_name)
        codes = affine.encode(weight, *affine.range_grid(weight, spec), spec)
        found[name] = packed.grid(packed.pack(codes), spec, n, k)
    return found


def in_turn(row: Any, grid: Any) -> Callable[[], Any]:
    """Gives copies of a grid in the layout of a row, one after the other."""
    from hfq.kernels import huge_pages

    codes, scales = (row.prepare(each, 8) for each in (grid.qweight, grid.scales))
    copies = max(2, ROTATED // codes.numel())
    many = huge_pages.empty((copies, *codes.shape), codes.dtype)
    many.copy_(codes)
    turn = itertools.cycle([replace(grid, qweight=each, scales=scales) for each in many.unbind()])
    return lambda: next(turn)


def products(n: int, k: int) -> dict[tuple[str, int], Callable[[], Any]]:
    """What multiplies, by name and tokens, after all were compared with float64."""
    import torch

    from hfq.core.activations import rounded_tokens
    from hfq.core.float8 import E4M3
    from hfq.kernels import dispatch
    from hfq.kernels.row import Problem

    works: dict[tuple[str, int], Callable[[], Any]] = {}
    generator = torch.Generator().manual_seed(1)
    x = {tokens: torch.randn(tokens, k, generator=generator).bfloat16() for tokens in TOKENS}
    for name, grid in grids(n, k).items():
        stored = dispatch.rows(type(grid))[-1]
        dense = stored.dequantize(grid, torch.float32).double()
        rows = {name: dispatch.select(Problem.of(grid)).row}
        if name in BEFORE:
            rows[BEFORE[name]] = stored
        for each, row in rows.items():
            turn = in_turn(row, grid)

            def product(tokens: Any, row: Any = row, turn: Callable[[], Any] = turn) -> Any:
                with torch.no_grad():
                    return row.linear(tokens, turn(), None, False)

            for count, tokens in x.items():
                read = rounded_tokens(tokens, None, E4M3) if name == BOTH else tokens
                expected = read.double() @ dense.T
                error = (product(tokens).double() - expected).norm() / expected.norm()
                assert error < 0.005, (each, n, k, count, error)
                works[each, count] = functools.partial(product, tokens)
    return works


def measure(rounds: int) -> list[dict[str, Any]]:
    from cpu import seconds_in_turn

    from hfq.diagnose.machine import read_bandwidth

    found: list[dict[str, Any]] = []
    for shape in SHAPES:
        works = products(*shape)
        print(f"{shape[0]} x {shape[1]} is right", flush=True)
        taken: dict[tuple[str, int], list[float]] = {key: [] for key in works}
        bandwidth = []
        for _ in range(rounds):
            bandwidth.append(read_bandwidth() / 1e9)
            # Each number of tokens for itself: those that take long would leave little of the others.
            for count in TOKENS:
                keys = [key for key in works if key[1] == count]
                seconds = seconds_in_turn([works[key] for key in keys], 2)
                for key, own in zip(keys, seconds, strict=True):
                    taken[key] += own
        for (name, count), seconds in taken.items():
            found.append(
                {
                    "weights": name,
                    "shape": list(shape),
                    "tokens": count,
                    "milliseconds": statistics.median(seconds) * 1e3,
                    "least_milliseconds": min(seconds) * 1e3,
                    "read_GB_per_second": max(bandwidth),
                }
            )
    return found


def report(found: list[dict[str, Any]]) -> None:
    from hfq.table import format_table

    rows = []
    for shape, name in itertools.product(SHAPES, NAMES):
        own = [each for each in found if (each["weights"], tuple(each["shape"])) == (name, shape)]
        times = [f"{each['milliseconds']:.2f} ({each['least_milliseconds']:.2f})" for each in own]
        rows.append((name, f"{shape[0]} x {shape[1]}", *times))
    print(format_table(("weights", "N x K", *(f"M={count}" for count in TOKENS)), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import machine
    import torch

    from hfq.kernels import native

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    results = {"isa": native.load().isa, "rows": measure(args.rounds)}
    report(results["rows"])
    print(f"written: {machine.write('cpu_fp8', 'python benchmarks/cpu_fp8.py', results).name}")


if __name__ == "__main__":
    main()
