"""Gradients dX of products with packed weights, beside those with a dense bfloat16 weight."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from gpu_clock import Clock, graph_of, in_turns, ratio, replayable, spread
from gpu_plan import Plan
from gpu_weights import KINDS, Dense, Packed, random_tokens, relative_error
from torch import Tensor

__all__ = ["gradients"]


def gradients(clock: Clock, plan: Plan) -> dict[str, Any]:
    """Every gradient checked against float64, then timed in turn with bfloat16."""
    rows = []
    for k, n in plan.gradient_shapes:
        dense = Dense(n, k, clock.device, clock.cache_bytes)
        for name in plan.kinds:
            weight = Packed(KINDS[name], n, k, clock.device, clock.cache_bytes)
            for m in plan.gradient_tokens:
                row = {"weights": name, "shape": [k, n], "tokens": m, "failure": ""}
                row["kernel"] = weight.choice.row.name
                try:
                    row |= _gradient_row(clock, plan, weight, dense, m)
                except (RuntimeError, AssertionError) as error:
                    row["failure"] = str(error).splitlines()[0]
                rows.append(row)
            print(f"gradient, {name}, {k} x {n}", flush=True)
            del weight
    return {"rows": rows}


def _gradient_row(clock: Clock, plan: Plan, weight: Packed, dense: Dense, m: int) -> dict[str, Any]:
    """One weight with M tokens.

    A gradient needs its forward in the same graph, so both are timed together, and forwards alone are taken off.
    """
    n, k = weight.exact.shape
    x, grad = random_tokens(m, k, clock.device).requires_grad_(), random_tokens(m, n, clock.device)
    copies = len(weight.grids)

    def forwards() -> list[Tensor]:
        return [weight.linear(x) for _ in range(copies)]

    def both() -> None:
        for y in forwards():
            torch.autograd.grad(y, x, grad)

    found = torch.autograd.grad(weight.linear(x), x, grad)[0]
    error = relative_error(found, grad.double() @ weight.exact)
    assert error < 0.01, f"relative error of the gradient {error:.4f}"
    peer = graph_of(clock, dense.gradient, grad, len(dense.weights))
    (whole, reason), (part, _) = replayable(clock, both), replayable(clock, forwards)
    together, alone, theirs = in_turns(clock, [whole, part, peer.replay], plan.rounds)
    # Noise may leave nothing of a small gradient.
    ours = [max(a - b, 1e-9) / copies for a, b in zip(together, alone, strict=True)]
    others = [each / peer.calls for each in theirs]
    return {
        "relative_error": error,
        "no_graph": reason,
        "microseconds": median(ours) * 1e6,
        "spread": spread(ours),
        "bfloat16_microseconds": median(others) * 1e6,
        "TFLOP_per_second": 2 * m * n * k / median(ours) / 1e12,
        "ratio_to_bfloat16": ratio(others, ours),
    }
