"""Products of packed weights with each number of tokens, beside bfloat16 and what copies of memory reach."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from gpu_clock import Clock, Graphed, graph_of, in_turns, ratio, replayable, spread
from gpu_plan import Plan
from gpu_weights import KINDS, Dense, Packed, random_tokens, random_weight

__all__ = ["kernels"]

# Calls from Python in one measurement.
_EAGER_CALLS = 20


def kernels(clock: Clock, plan: Plan) -> dict[str, Any]:
    """Every product checked against float64, then timed in turn with bfloat16."""
    limits = _ceilings(clock, plan.rounds)
    rows: list[dict[str, Any]] = []
    for k, n in plan.shapes:
        dense = Dense(n, k, clock.device, clock.cache_bytes)
        peers = {
            m: graph_of(clock, dense.linear, random_tokens(m, k, clock.device), len(dense.weights))
            for m in plan.tokens
        }
        for name in plan.kinds:
            rows += _kernel_rows(clock, plan, name, (k, n), peers)
            print(f"{name}, {k} x {n}: {rows[-1]['kernel']}", flush=True)
        del dense, peers
        gc.collect()
    for row in rows:
        if not row["failure"]:
            row["share_of_copy"] = row["GB_per_second"] / limits["copy_GB_per_second"]
    return {"ceilings": limits, "rows": rows}


def _kernel_rows(
    clock: Clock, plan: Plan, name: str, shape: tuple[int, int], peers: Mapping[int, Graphed]
) -> list[dict[str, Any]]:
    """One weight with every number of tokens; `peers`: M -> the same product in bfloat16."""
    k, n = shape
    try:
        weight = Packed(KINDS[name], n, k, clock.device, clock.cache_bytes)
    except RuntimeError as error:
        failed = {"kernel": "none", "refused": {}, "failure": str(error).splitlines()[0]}
        return [{"weights": name, "shape": [k, n], "tokens": m, **failed} for m in plan.tokens]
    return [_kernel_row(clock, plan, name, weight, m, peers[m]) for m in plan.tokens]


def _kernel_row(
    clock: Clock, plan: Plan, name: str, weight: Packed, m: int, peer: Graphed
) -> dict[str, Any]:
    """One weight with M tokens beside `peer`, the same product in bfloat16; without times where it fails."""
    n, k = weight.exact.shape
    x = random_tokens(m, k, clock.device)
    row: dict[str, Any] = {
        "weights": name,
        "shape": [k, n],
        "tokens": m,
        "kernel": weight.choice.row.name,
        "refused": dict(weight.choice.refused),
        "bytes": weight.size,
        "failure": "",
    }
    try:
        row["relative_error"], row["failure"] = weight.checked(x)
        if row["failure"]:
            return row
        own = graph_of(clock, weight.linear, x, len(weight.grids))
        eager = clock.eager_seconds(functools.partial(weight.linear, x), _EAGER_CALLS)
        taken, theirs = in_turns(clock, [own.replay, peer.replay], plan.rounds)
    except RuntimeError as error:
        row["failure"] = str(error).splitlines()[0]
        return row
    seconds = [each / own.calls for each in taken]
    others = [each / peer.calls for each in theirs]
    middle = median(seconds)
    return row | {
        "no_graph": own.no_graph,
        "microseconds": middle * 1e6,
        "spread": spread(seconds),
        "eager_microseconds": eager * 1e6,
        "bfloat16_microseconds": median(others) * 1e6,
        "GB_per_second": weight.size / middle / 1e9,
        "TFLOP_per_second": 2 * m * n * k / middle / 1e12,
        "ratio_to_bfloat16": ratio(others, seconds),
    }


def _ceilings(clock: Clock, rounds: int) -> dict[str, float]:
    """Copies within the device, bytes read and written, and bfloat16 products of squares."""
    source = torch.zeros(clock.copy_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    size = clock.square
    a, b = random_weight(size, size, clock.device), random_weight(size, size, clock.device)
    copy, _ = replayable(clock, lambda: target.copy_(source))
    product, _ = replayable(clock, lambda: a @ b.T)
    copied, multiplied = in_turns(clock, [copy, product], rounds)
    return {
        "copy_GB_per_second": 2 * clock.copy_bytes / median(copied) / 1e9,
        "bfloat16_TFLOP_per_second": 2 * size**3 / median(multiplied) / 1e12,
    }
