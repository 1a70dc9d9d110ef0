"""hfq on a GPU beside bfloat16 products of the matrix library. Checks that products are right before it times them.

    python benchmarks/gpu.py [--only kernels] [--kinds "int4 g128" "nf4 g64"] [--rounds 5]
    python benchmarks/gpu.py --dry-run    # all but the timing, on the CPU, with tiny sizes; writes nothing
    python benchmarks/gpu.py --plot       # draws results/gpu_*.json once more and judges them, measures nothing

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
import functools
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

import machine
import torch
from gpu_clock import Clock, CpuClock, CudaClock, in_turns, replayable
from gpu_report import PICTURES, REPORTS, goals, report_goals
from gpu_weights import KINDS, Dense, Packed, random_weight, relative_error
from torch import Tensor

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


# Environment variables that leave out a way to be fast if they are 0, and what results are called that were measured so.
SWITCHES = {"HFQ_CUDA_OVERLAP": "no-overlap", "HFQ_CUDA_WGMMA": "no-wgmma"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        shapes: (K, N); the goals are about `large` ones.
        gradients: (K, N) and tokens of gradients; what they are about.
        packed: (K, N) of the weight that is packed.
        layers: of the checkpoint that is loaded.
        steps: of decoding in one measurement.
        room: tokens that a cache has room for, `context` of which are the prompt.
    """

    shapes: tuple[tuple[int, int], ...] = (
        (4096, 4096),
        (4096, 14336),
        (14336, 4096),
        (8192, 28672),
    )
    large: tuple[tuple[int, int], ...] = ((4096, 14336), (14336, 4096), (8192, 28672))
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
    kinds: tuple[str, ...] = tuple(KINDS)
    gradient_shapes: tuple[tuple[int, int], ...] = ((4096, 14336), (14336, 4096))
    gradient_tokens: tuple[int, ...] = (512, 2048)
    models: tuple[str, ...] = ("int4 g128", "nf4 g64", "W8A8 dynamic", "fp8 dynamic")
    llama: Mapping[str, int]
    context: int = 128
    room: int = 256
    steps: int = 16
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (512, 2048)
    packed: tuple[int, int] = (4096, 14336)
    layers: int = 4
    compiled: bool = False
    rounds: int = 5


FULL = Plan(llama=LLAMA_8B)
# K and N that all kernels of the CPU and the GPU take, too.
TINY = Plan(
    shapes=((64, 96), (128, 64)),
    large=((128, 64),),
    tokens=(1, 16, 64, 256),
    gradient_shapes=((128, 64),),
    gradient_tokens=(8,),
    models=("int4 g128", "W8A8 dynamic"),
    llama={
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    context=4,
    room=16,
    steps=2,
    batches=(1, 2),
    prompts=(8,),
    packed=(128, 96),
    layers=2,
    rounds=2,
)


# ---- ceilings


def ceilings(clock: Clock, rounds: int) -> dict[str, float]:
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


# ---- kernels


def kernels(clock: Clock, plan: Plan) -> dict[str, Any]:
    """Every product checked against float64, then timed in turn with bfloat16."""
    limits = ceilings(clock, plan.rounds)
    rows: list[dict[str, Any]] = []
    for k, n in plan.shapes:
        dense = Dense(n, k, clock.device, clock.cache_bytes)
        peers = {
            m: graph_of(clock, dense.linear, tokens_of(m, k, clock), len(dense.weights))
            for m in plan.tokens
        }
        for name in plan.kinds:
            rows += kernel_rows(clock, plan, name, (k, n), peers)
            print(f"{name}, {k} x {n}: {rows[-1]['kernel']}", flush=True)
        del dense, peers
        gc.collect()
    for row in rows:
        if not row["failure"]:
            row["share_of_copy"] = row["GB_per_second"] / limits["copy_GB_per_second"]
    return {"ceilings": limits, "rows": rows}


def kernel_rows(
    clock: Clock, plan: Plan, name: str, shape: tuple[int, int], peers: Mapping[int, Graphed]
) -> list[dict[str, Any]]:
    """One weight with every number of tokens."""
    k, n = shape
    try:
        weight = Packed(KINDS[name], n, k, clock.device, clock.cache_bytes)
    except RuntimeError as error:
        failed = {"kernel": "none", "refused": {}, "failure": str(error).splitlines()[0]}
        return [{"weights": name, "shape": [k, n], "tokens": m, **failed} for m in plan.tokens]
    return [kernel_row(clock, plan, name, weight, m, peers[m]) for m in plan.tokens]


def kernel_row(
    clock: Clock, plan: Plan, name: str, weight: Packed, m: int, peer: Graphed
) -> dict[str, Any]:
    n, k = weight.exact.shape
    x = tokens_of(m, k, clock)
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
        row["relative_error"] = relative_error(weight.linear(x), x.double() @ weight.exact.T)
        if not row["relative_error"] < KINDS[name].bound:
            row["failure"] = (
                f"relative error {row['relative_error']:.4f}, at most {KINDS[name].bound}"
            )
            return row
        own = graph_of(clock, weight.linear, x, len(weight.grids))
        eager = clock.eager_seconds(functools.partial(weight.linear, x), 20)
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


@dataclass(frozen=True, kw_only=True)
class Graphed:
    """Attributes:
    replay: so many calls, each with the next copy of the weight.
    no_graph: why they are no graph; empty if they are one.
    """

    replay: Callable[[], Any]
    calls: int
    no_graph: str


def graph_of(clock: Clock, linear: Callable[[Tensor], Tensor], x: Tensor, copies: int) -> Graphed:
    def calls() -> None:
        for _ in range(copies):
            linear(x)

    replay, reason = replayable(clock, calls)
    return Graphed(replay=replay, calls=copies, no_graph=reason)


def tokens_of(m: int, k: int, clock: Clock) -> Tensor:
    """Normal bfloat16 `[M, K]`, the same for the same sizes."""
    generator = torch.Generator(clock.device).manual_seed(m)
    return torch.randn(m, k, generator=generator, device=clock.device, dtype=torch.bfloat16)


def spread(values: Sequence[float]) -> float:
    """Half of the values lie in a range of this share of their median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast we are; the median over rounds."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))


# ---- gradients


def gradients(clock: Clock, plan: Plan) -> dict[str, Any]:
    rows = []
    for k, n in plan.gradient_shapes:
        dense = Dense(n, k, clock.device, clock.cache_bytes)
        for name in plan.kinds:
            weight = Packed(KINDS[name], n, k, clock.device, clock.cache_bytes)
            for m in plan.gradient_tokens:
                row = {"weights": name, "shape": [k, n], "tokens": m, "failure": ""}
                row["kernel"] = weight.choice.row.name
                try:
                    row |= gradient_row(clock, plan, weight, dense, m)
                except (RuntimeError, AssertionError) as error:
                    row["failure"] = str(error).splitlines()[0]
                rows.append(row)
            print(f"gradient, {name}, {k} x {n}", flush=True)
            del weight
    return {"rows": rows}


def gradient_row(clock: Clock, plan: Plan, weight: Packed, dense: Dense, m: int) -> dict[str, Any]:
    """Forwards and gradients are captured together, since gradients belong to a forward; those alone are taken off."""
    n, k = weight.exact.shape
    x, grad = tokens_of(m, k, clock).requires_grad_(), tokens_of(m, n, clock)
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
    (whole, reason), (first, _) = replayable(clock, both), replayable(clock, forwards)
    all_, forward, theirs = in_turns(clock, [whole, first, peer.replay], plan.rounds)
    ours = [max(a - b, 1e-9) / copies for a, b in zip(all_, forward, strict=True)]
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


# ---- models


def models(clock: Clock, plan: Plan) -> dict[str, Any]:
    """Each model checked, then all in turn."""
    generator = torch.Generator().manual_seed(0)
    size = (max(plan.batches), max(plan.prompts))
    ids = torch.randint(plan.llama["vocab_size"], size, generator=generator).to(clock.device)
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    works: dict[str, dict[str, Callable[[], Any]]] = {}
    for name in ("bfloat16", *plan.models):
        try:
            works[name], found[name] = checked_model(clock, plan, name, ids)
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


def checked_model(
    clock: Clock, plan: Plan, name: str, ids: Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Task -> work, and all that is known before anything is timed."""
    import gpu_models

    made: list[Any] = []

    def make() -> None:
        kind = None if name == "bfloat16" else name
        made.append(gpu_models.random_model(plan.llama, kind, clock.device))

    peak = clock.peak_bytes(make)
    model = made[0]
    about = {
        "weight_bytes": gpu_models.weight_bytes(model),
        "peak_bytes": peak,
        "kernels": gpu_models.kernels_of(model),
        "difference_to_dequantized": gpu_models.check_products(model, ids[:1, : plan.context]),
        "tokens_per_second": {},
        "spread": {},
        "ratio_to_bfloat16": {},
    }
    works, checks = model_tasks(clock, plan, model, ids, name)
    return works, about | checks


def tasks_of(plan: Plan) -> dict[str, int]:
    """Task -> tokens that its work gives."""
    tasks = {f"decode, batch {batch}": batch * plan.steps for batch in plan.batches}
    if plan.compiled:
        tasks["decode, batch 1, compiled"] = plan.steps
    return tasks | {f"prefill {length}": length for length in plan.prompts}


def model_tasks(
    clock: Clock, plan: Plan, model: Any, ids: Tensor, name: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Task -> work, and what was found while they were checked."""
    from gpu_models import Decoder

    works: dict[str, Callable[[], Any]] = {}
    checks: dict[str, Any] = {"no_graph": {}, "difference_of_step": {}}
    wanted = [(f"decode, batch {batch}", batch, False) for batch in plan.batches]
    if plan.compiled and name in ("bfloat16", "int4 g128"):
        wanted.append(("decode, batch 1, compiled", 1, True))
    for task, batch, compiled in wanted:
        decoder = Decoder(model, ids[:batch, : plan.context], plan.room, compiled)
        for _ in range(3):  # layers that read the same input find each other
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


# ---- packing


def packing(clock: Clock, plan: Plan) -> dict[str, Any]:
    from gpu_packing import load_checkpoint, pack_weights

    shape = {**plan.llama, "num_hidden_layers": plan.layers}
    return {
        "weights": pack_weights(clock, plan.packed, plan.kinds, plan.rounds),
        "loading": load_checkpoint(clock, shape, plan.models[:2], min(plan.rounds, 3)),
    }


PARTS: dict[str, Callable[[Clock, Plan], dict[str, Any]]] = {
    "kernels": kernels,
    "gradients": gradients,
    "models": models,
    "packing": packing,
}


# ---- the program


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
    """A JSON for each part, and its pictures; some formats alone, or other kernels, do not replace what was measured of all."""
    switched = [name for name in SWITCHES if os.environ.get(name) == "0"]
    whole = plan.kinds == FULL.kinds and not switched
    formats = [] if plan.kinds == FULL.kinds else [kind.replace(" ", "-") for kind in plan.kinds]
    name = "_".join(["gpu", part, *formats, *(SWITCHES[switch] for switch in switched)])
    command = shlex.join(["python", "benchmarks/gpu.py", *arguments])
    command = " ".join([*(f"{switch}=0" for switch in switched), command])
    path = machine.write(name, command, {**about_gpu(), part: found})
    print(f"written: {path.name}")
    if whole:
        draw(part, found)


def failures(results: Mapping[str, Any]) -> int:
    rows = [
        row for part in ("kernels", "gradients") for row in results.get(part, {"rows": ()})["rows"]
    ]
    return sum(bool(row["failure"]) for row in rows) + len(
        results.get("models", {"left_out": ()})["left_out"]
    )


def draw(part: str, found: Mapping[str, Any]) -> None:
    for file, (shown, picture) in PICTURES.items():
        if shown == part:
            path = machine.RESULTS / f"{file}.svg"
            path.write_text(picture(found), encoding="utf-8")
            print(f"drawn: {path.name}")


def draw_again() -> int:
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
