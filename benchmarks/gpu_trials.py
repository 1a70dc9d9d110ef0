"""Kernels that no GPU has timed yet, each in turn with what is taken in its place, and with bfloat16.

A kernel that wins here becomes the rule, and what it replaces goes; one that loses goes. With none left this file goes, too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from gpu_clock import Clock, graph_of, in_turns, ratio, spread
from gpu_plan import Plan
from gpu_weights import KINDS, Dense, Packed, random_tokens
from torch import Tensor

from hfq.kernels.cuda import max_direct_tokens

__all__ = ["TRY", "trials"]

# Names of kernels, with commas.
TRY = "HFQ_CUDA_TRY"
# Name -> whether it is for so many tokens (M), of which the packed weight is read directly up to `most`.
_TRIALS: dict[str, Callable[[int, int], bool]] = {
    "wide": lambda m, most: m <= 16,
    "staged": lambda m, most: 16 < m <= 64,
    "tokens256": lambda m, most: 128 < m <= most,
}
# Formats that other kernels multiply.
_OTHERS = ("W8A8 dynamic", "fp8 dynamic", "spqr 3 bits")


def trials(clock: Clock, plan: Plan) -> dict[str, Any]:
    """Every product of the large shapes that a trial is for, on compute capability 9.0; checked against float64 before it is timed."""
    rows: list[dict[str, Any]] = []
    if clock.device.type == "cuda" and torch.cuda.get_device_capability(clock.device) != (9, 0):
        print("trials are for compute capability 9.0, which this GPU has not")
        return {"rows": rows}
    for k, n in plan.large:
        dense = Dense(n, k, clock.device, clock.cache_bytes)
        for kind in plan.kinds:
            if kind in _OTHERS:
                continue
            weight = Packed(KINDS[kind], n, k, clock.device, clock.cache_bytes)
            most = max_direct_tokens(weight.grids[0], clock.device, torch.bfloat16)
            for trial, is_for in _TRIALS.items():
                for m in (tokens for tokens in plan.tokens if is_for(tokens, most)):
                    row = {"trial": trial, "weights": kind, "shape": [k, n], "tokens": m}
                    rows.append(row | _row(clock, plan.rounds, trial, weight, dense, m))
            print(f"{kind}, {k} x {n}", flush=True)
            del weight
            gc.collect()
        del dense
        gc.collect()
    return {"rows": rows}


def _row(
    clock: Clock, rounds: int, trial: str, weight: Packed, dense: Dense, m: int
) -> dict[str, Any]:
    """One product with and without the trial; "failure" and no times where it is wrong, raises or is the same kernel."""
    x = random_tokens(m, weight.exact.shape[1], clock.device)

    def product() -> Tensor:
        return weight.linear(x)

    try:
        with patch.dict(os.environ, {TRY: ""}):  # which the library reads at each launch
            before = clock.kernels(product)
            graphs = [graph_of(clock, weight.linear, x, len(weight.grids))]
        with patch.dict(os.environ, {TRY: trial}):
            kernels = clock.kernels(product)
            _, failure = weight.checked(x)
            graphs.append(graph_of(clock, weight.linear, x, len(weight.grids)))
        if kernels and kernels == before:
            failure = f"{TRY}={trial} takes the same kernels: is the library older than it?"
        if failure:
            return {"kernels": kernels, "failure": failure}
        graphs.append(graph_of(clock, dense.linear, x, len(dense.weights)))
        taken = in_turns(clock, [graph.replay for graph in graphs], rounds)
    except RuntimeError as error:
        return {"failure": str(error).splitlines()[0]}
    without, own, theirs = (
        [seconds / graph.calls for seconds in each]
        for graph, each in zip(graphs, taken, strict=True)
    )
    return {
        "kernels": kernels,
        "failure": "",
        "microseconds": median(own) * 1e6,
        "spread": spread(own),
        "without_microseconds": median(without) * 1e6,
        "bfloat16_microseconds": median(theirs) * 1e6,
        "times_as_fast": ratio(without, own),
        "ratio_to_bfloat16": ratio(theirs, own),
    }
