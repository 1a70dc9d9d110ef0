"""Whole models: tokens per second of greedy decoding and of prompts, beside bfloat16; weights, memory, and that logits are right."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu_clock import Clock, in_turns, ratio, replayable, spread
from gpu_plan import Plan
from torch import Tensor

__all__ = ["models", "tasks_of"]


def models(clock: Clock, plan: Plan) -> dict[str, Any]:
    """Each model made and checked, then each task with all of them in turn."""
    generator = torch.Generator().manual_seed(0)
    size = (max(plan.batches), max(plan.prompts))
    ids = torch.randint(plan.llama["vocab_size"], size, generator=generator).to(clock.device)
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    works: dict[str, dict[str, Callable[[], Any]]] = {}
    for name in ("bfloat16", *plan.models):
        try:
            works[name], found[name] = _checked_model(clock, plan, name, ids)
        except (RuntimeError, AssertionError) as error:  # no memory is a RuntimeError, too
            left_out[name] = str(error).splitlines()[0]
        if name in left_out:
            gc.collect()  # after the error, which held what was made
            clock.free_bytes()
            continue
        print(f"{name}: {found[name]['weight_bytes'] / 1e9:.2f} GB of weights", flush=True)
    for task, tokens in tasks_of(plan).items():
        names = [name for name in works if task in works[name]]
        taken = in_turns(clock, [works[name][task] for name in names], plan.rounds)
        by_name = dict(zip(names, taken, strict=True))
        for name, seconds in by_name.items():
            one = found[name]
            one["tokens_per_second"][task] = tokens / median(seconds)
            one["spread"][task] = spread(seconds)
            if "bfloat16" in by_name:
                one["ratio_to_bfloat16"][task] = ratio(by_name["bfloat16"], seconds)
    return {"shape": dict(plan.llama), "models": found, "left_out": left_out}


def _checked_model(
    clock: Clock, plan: Plan, name: str, ids: Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """One model, bfloat16 or of a kind in `KINDS`: task -> work, and all that is known before anything is timed."""
    import gpu_llama  # here: Transformers takes seconds to import

    made: list[Any] = []

    def make() -> None:
        kind = None if name == "bfloat16" else name
        made.append(gpu_llama.random_model(plan.llama, kind, clock.device))

    peak = clock.peak_bytes(make)
    model = made[0]
    about = {
        "weight_bytes": gpu_llama.weight_bytes(model),
        "peak_bytes": peak,
        "kernels": gpu_llama.kernels_of(model),
        "difference_to_dequantized": gpu_llama.check_products(model, ids[:1, : plan.context]),
        "tokens_per_second": {},
        "spread": {},
        "ratio_to_bfloat16": {},
    }
    works, checks = _model_tasks(clock, plan, model, ids, name)
    return works, about | checks


def tasks_of(plan: Plan) -> dict[str, int]:
    """Task -> tokens that its work gives."""
    tasks = {f"decode, batch {batch}": batch * plan.steps for batch in plan.batches}
    if plan.compiled:
        tasks["decode, batch 1, compiled"] = plan.steps
    return tasks | {f"prefill {length}": length for length in plan.prompts}


def _model_tasks(
    clock: Clock, plan: Plan, model: Any, ids: Tensor, name: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Task -> work, and what was found while they were checked."""
    from gpu_llama import Decoder  # as above

    works: dict[str, Callable[[], Any]] = {}
    checks: dict[str, Any] = {"no_graph": {}, "difference_of_step": {}}
    wanted = [(f"decode, batch {batch}", batch, False) for batch in plan.batches]
    if plan.compiled and name in ("bfloat16", "int4 g128"):
        wanted.append(("decode, batch 1, compiled", 1, True))
    for task, batch, compiled in wanted:
        decoder = Decoder(model, ids[:batch, : plan.context], plan.room, compiled)
        for _ in range(3):  # layers that read the same input find each other (hfq/nn/siblings.py)
            decoder.step()
        step, reason = replayable(clock, decoder.step)
        if reason:
            checks["no_graph"][task] = reason
        checks["difference_of_step"][task] = decoder.check(step)

        def decode(decoder: Decoder = decoder, step: Callable[[], Any] = step) -> None:
            decoder.rewind()
            for _ in range(plan.steps):
                step()

        works[task] = decode

    for length in plan.prompts:

        @torch.no_grad()
        def prompt(length: int = length) -> None:
            model(ids[:1, :length], use_cache=False, logits_to_keep=1)

        works[f"prefill {length}"] = prompt
    return works, checks
