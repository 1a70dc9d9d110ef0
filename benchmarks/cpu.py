"""CPU kernels and whole models beside other people's, in turn, one run. Checks that products are right before it times them.

    python benchmarks/cpu.py [--llamacpp PYTHON] [--bitsandbytes PYTHON] [--quanto PYTHON] [--torchao PYTHON]
                             [--gptqmodel PYTHON] [--openvino PYTHON] [--llamacpp-avx2 PYTHON]
                             [--work FOLDER] [--rounds 5]
    python benchmarks/cpu.py --plot    # draws results/cpu_*.json once more, measures nothing

PYTHON is the interpreter of an environment that has the package (benchmarks/peers/*_worker.py run in it). All models are loaded
at once, one process each, and take turns: a round is one measurement of each. All use every core.

Kernels: milliseconds of a product with weights that come from memory, and which share of the measured read bandwidth that is.
Gradients: milliseconds of grad W for training, beside the same product with a dense weight, in bfloat16 and in float32.
Models: a 1B-parameter Llama shape with random weights; seconds of a prompt of 512 tokens, and of a step of `model.generate`.
AVX2: hfq held to it beside a llama.cpp that was built for it.
Step: what a step of `model.generate` takes beside its products, which give zeros here, with and without native code for the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
TRANSFORMERS, LLAMA_CPP = PEERS / "transformers_worker.py", PEERS / "llamacpp_worker.py"
GPTQ_CHECKPOINT = PEERS / "gptq_checkpoint.py"

# (N, K) of the shape's layers, the head among them.
SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (32000, 2048))
TOKENS = (1, 2, 4, 8, 16, 64, 512)
GROUP = 128
ROTATED = (
    512 << 20
)  # bytes of weights that a kernel goes through in turn, so that none is in a cache

# Weights whose gradients are timed: bits, columns of a group (0: all), whether there is a codebook.
GRADIENTS = {"int4 g128": (4, 128, False), "nf4 g64": (4, 64, True), "int8": (8, 0, False)}
GRADIENT_SHAPES = ((8192, 2048), (2048, 8192))
GRADIENT_TOKENS = (512, 2048)

TASKS = {
    "prefill 512": ("prefill", 1, 512),
    "decode, batch 1": ("decode", 1, 24),
    "decode, batch 8": ("decode", 8, 12),
}
# What hfq packs; the head as well, as llama.cpp does.
OURS: dict[str, dict[str, Any]] = {
    "hfq int4 g128": {"bits": 4},
    "hfq int8": {"format": "int8"},
}
WHOLE = {"quantize_lm_head": True, "quantize_embeddings": True}
PACKED = "hfq int4 g128"

# Holds hfq, PyTorch and oneDNN to AVX2.
AVX2 = {"HFQ_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

# Name -> kind of transformers_worker.py.
STEPS = {"the model's own code": "hfq-plain-free", "native code": "hfq-free"}


# ---- kernels


def weight(
    bits: int, rows: int, columns: int, generator: Any, group: int = GROUP, table: Any = None
) -> Any:
    """A random weight as it is stored: codes, scales and what they stand for in float32."""
    import torch

    from hfq.core.bits import pack

    codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = columns // group
    scales = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).half()
    values = codes.float() - (1 << (bits - 1)) if table is None else table[codes.int()]
    dense = (values.view(rows, groups, group) * scales.float().unsqueeze(-1)).view(rows, columns)
    return pack(codes, bits).unsqueeze(-1), scales, dense


def kernels(rounds: int) -> dict[str, Any]:
    """Every product checked against float64, then all timed in turn; the read bandwidth is measured in every round."""
    from hfq.diagnose.machine import read_bandwidth

    rows: list[dict[str, Any]] = []
    works: list[Callable[[], Any]] = []
    for bits, shape in itertools.product((2, 3, 4, 8), SHAPES):
        size, products = checked_products(bits, *shape)
        for tokens, product in products.items():
            rows.append({"bits": bits, "shape": list(shape), "tokens": tokens, "bytes": size})
            works.append(product)
        print(f"int{bits} {shape[0]} x {shape[1]} is right", flush=True)
    bandwidth: list[float] = []
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        bandwidth.append(read_bandwidth() / 1e9)
        for taken, work in zip(seconds, works, strict=True):
            taken += seconds_in_turn([work], 1)[0]
        print(f"round {number + 1} of {rounds}: reads {bandwidth[-1]:.1f} GB/s", flush=True)
    read = statistics.median(bandwidth)
    for row, taken in zip(rows, seconds, strict=True):
        median = statistics.median(taken)
        row["milliseconds"] = median * 1e3
        row["GB_per_second"] = row.pop("bytes") / median / 1e9
        row["share_of_read_bandwidth"] = row["GB_per_second"] / read
    return {"read_GB_per_second": read, "rows": rows}


def checked_products(bits: int, n: int, k: int) -> tuple[int, dict[int, Callable[[], Any]]]:
    """Bytes of a weight, and what multiplies by tokens, up to 16, after all were compared with float64."""
    import torch

    from hfq.kernels import huge_pages, rows16
    from hfq.kernels.cpu import call

    generator = torch.Generator().manual_seed(0)
    codes, scales, dense = weight(bits, n, k, generator)
    lines = rows16.to_rows16(codes, split=bits == 3)
    copies = max(2, ROTATED // lines.numel())
    many = huge_pages.empty((copies, *lines.shape), torch.uint8)
    many.copy_(lines)
    operands = (rows16.to_rows16(scales), None, None, None, bits, GROUP, k, n)
    turn = itertools.cycle(many.unbind())

    def product(x: Any, int8: bool = True) -> Any:
        with torch.no_grad():  # as in `generate`
            return call(torch.ops.hfq.cpu_linear, x, next(turn), *operands, int8)

    products = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, k, generator=generator).bfloat16()
        expected = x.double() @ dense.double().T
        for int8 in (True, False):
            error = (product(x, int8).double() - expected).norm() / expected.norm()
            assert error < (0.02 if int8 else 0.005), (bits, n, k, tokens, int8, error)
        if tokens <= 16:
            products[tokens] = functools.partial(product, x)
    return lines.numel() + scales.numel() * 2, products


def seconds_in_turn(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(4 * rounds):
        for work, taken in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return seconds


# ---- gradients


def gradients(rounds: int) -> list[dict[str, Any]]:
    """grad W of packed weights, checked against float64, then timed in turn with a dense W.

    Processors without products of bfloat16 multiply float32 several times faster, so that both are the measure.
    """
    import torch

    from hfq.core.codebooks import codebook
    from hfq.kernels import rows16
    from hfq.kernels.ops import rows16_weight

    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for (n, k), (name, kind) in itertools.product(GRADIENT_SHAPES, GRADIENTS.items()):
        bits, group, has_table = kind
        group = group or k
        table = codebook("nf4") if has_table else None
        codes, scales, exact = weight(bits, n, k, generator, group, table)
        lines = rows16.to_rows16(codes)
        operands, sizes = (lines, rows16.to_rows16(scales), None, table), (bits, group, k, n)
        dense = {
            dtype: rows16_weight(operands, sizes, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        }
        for tokens in GRADIENT_TOKENS:
            x = torch.randn(tokens, k, generator=generator).bfloat16().requires_grad_()
            y = torch.ops.hfq.cpu_linear(x, *operands, None, *sizes, False)
            grad = torch.randn(tokens, n, generator=generator).bfloat16()

            def packed(x: Any = x, y: Any = y, grad: Any = grad) -> Any:
                return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

            def plain(dtype: torch.dtype, grad: Any = grad, dense: Any = dense) -> Any:
                return (grad.to(dtype) @ dense[dtype]).to(grad.dtype)

            expected = grad.double() @ exact.double()
            error = (packed().double() - expected).norm() / expected.norm()
            assert error < 0.005, (name, n, k, tokens, error)
            works = [packed, *(functools.partial(plain, dtype) for dtype in dense)]
            ours, narrow, wide = (
                [1e3 * second for second in seconds] for seconds in seconds_in_turn(works, rounds)
            )
            fastest = min(statistics.median(narrow), statistics.median(wide))
            rows.append(
                {
                    "kind": "gradient",
                    "weights": name,
                    "shape": [n, k],
                    "tokens": tokens,
                    "milliseconds": statistics.median(ours),
                    "bfloat16_milliseconds": statistics.median(narrow),
                    "float32_milliseconds": statistics.median(wide),
                    "least_milliseconds": min(ours),
                    "bfloat16_least_milliseconds": min(narrow),
                    "float32_least_milliseconds": min(wide),
                    "speed_of_fastest_dense": fastest / statistics.median(ours),
                }
            )
            print(
                f"gradient, {name} {n} x {k}, {tokens} tokens: {rows[-1]['milliseconds']:.1f} ms, "
                f"bfloat16 {rows[-1]['bfloat16_milliseconds']:.1f}, "
                f"float32 {rows[-1]['float32_milliseconds']:.1f}",
                flush=True,
            )
    return rows


# ---- models


class Worker:
    """A process with a model, idle until it is asked."""

    def __init__(
        self, name: str, command: list[str], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        self.about = self.answer()

    def ask(self, task: str, batch: int, tokens: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task} {batch} {tokens}\n")
        self.process.stdin.flush()
        seconds: float = self.answer()["seconds"]
        return seconds

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # packages print to the same stream
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self.name} ended; see {self.log}:\n{self.log.read_text()[-2000:]}")

    def end(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak: float = self.answer()["peak_MiB"]
        self.process.wait()
        return peak


def make_models(work: Path) -> None:
    """The float checkpoint and those that hfq packs, where they are not there yet; in a process of its own."""
    from llama_1b import make

    if not (work / "float" / "config.json").exists():
        make(work / "float")
    import torch
    from transformers import AutoModelForCausalLM

    import hfq

    for name, settings in OURS.items():
        folder = packed_folder(work, name)
        if (folder / "config.json").exists():
            continue
        config = hfq.HfqConfig(**settings, **WHOLE)
        model = AutoModelForCausalLM.from_pretrained(
            work / "float", quantization_config=config, dtype=torch.bfloat16
        )
        model.save_pretrained(folder)


def packed_folder(work: Path, name: str) -> Path:
    return work / name.replace(" ", "-")


def packed_command(work: Path, kind: str = "hfq", name: str = PACKED) -> list[str]:
    return [sys.executable, str(TRANSFORMERS), kind, str(packed_folder(work, name))]


def commands(args: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    found = {name: packed_command(work, name=name) for name in OURS}
    found["bfloat16"] = [sys.executable, str(TRANSFORMERS), "bfloat16", str(work / "float")]
    for name in ("bitsandbytes", "quanto", "torchao", "openvino"):
        if python := getattr(args, name):
            kind = f"{name}-int8" if name == "torchao" else name
            found[kind] = [python, str(TRANSFORMERS), kind, str(work / "float")]
    if args.gptqmodel:
        folder = work / "gptq"
        if not (folder / "config.json").exists():
            subprocess.run(
                [sys.executable, str(GPTQ_CHECKPOINT), str(work / "float"), str(folder)], check=True
            )
        found["gptqmodel"] = [args.gptqmodel, str(TRANSFORMERS), "gptqmodel", str(folder)]
    if args.llamacpp:
        for kind in ("q4_0", "q4_k_m", "q8_0"):
            file = work / f"{kind}.gguf"
            if not file.exists():
                subprocess.run(
                    [args.llamacpp, str(LLAMA_CPP), "make", str(work / "float"), str(file), kind],
                    check=True,
                )
            found[f"llama.cpp {kind.upper()}"] = [args.llamacpp, str(LLAMA_CPP), "serve", str(file)]
    return found


def start(name: str, command: list[str], work: Path, **environment: str) -> Worker:
    worker = Worker(name, command, work / f"{name.replace(' ', '-')}.log", environment)
    print(f"loaded {name}: {worker.about['weights_MiB']:.0f} MiB", flush=True)
    return worker


def in_turn(workers: Sequence[Worker], tasks: Sequence[str], rounds: int) -> dict[str, Any]:
    """Every task by every worker, round by round; ends the workers."""
    seconds: dict[str, dict[str, list[float]]] = {w.name: {t: [] for t in tasks} for w in workers}
    for number in range(rounds + 1):  # the first one warms up
        for task in tasks:
            for worker in workers:
                taken = worker.ask(*TASKS[task])
                if number:
                    seconds[worker.name][task].append(taken)
            done = ", ".join(
                f"{w.name} {_rate(task, seconds[w.name][task][-1]):.1f}" for w in workers if number
            )
            print(f"round {number} of {rounds}: {task}: {done or 'warm'}", flush=True)
    return {
        worker.name: {
            **worker.about,
            "peak_MiB": worker.end(),
            "seconds": seconds[worker.name],
            "tokens_per_second": {
                task: _rate(task, statistics.median(taken))
                for task, taken in seconds[worker.name].items()
            },
        }
        for worker in workers
    }


def models(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    workers = [start(name, command, work) for name, command in commands(args, work).items()]
    return in_turn(workers, list(TASKS), args.rounds)


def avx2(args: argparse.Namespace, work: Path) -> dict[str, Any] | None:
    if not args.llamacpp_avx2:
        return None
    theirs = [args.llamacpp_avx2, str(LLAMA_CPP), "serve", str(work / "q4_0.gguf")]
    workers = [
        start(PACKED, packed_command(work), work, **AVX2),
        start("llama.cpp Q4_0", theirs, work),
    ]
    return in_turn(workers, list(TASKS), args.rounds)


def step(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    workers = [start(name, packed_command(work, kind), work) for name, kind in STEPS.items()]
    tasks = [task for task, (kind, *_) in TASKS.items() if kind == "decode"]
    return in_turn(workers, tasks, args.rounds)


def _rate(task: str, seconds: float) -> float:
    kind, batch, tokens = TASKS[task]
    return (tokens if kind == "prefill" else batch) / seconds


# ---- report


def report_kernels(found: dict[str, Any]) -> None:
    from hfq.table import format_table

    print(
        f"\nread bandwidth {found['read_GB_per_second']:.1f} GB/s; milliseconds by tokens, int8 activations"
    )
    rows = []
    for bits in (2, 3, 4, 8):
        for shape in SHAPES:
            times = [r for r in found["rows"] if (r["bits"], tuple(r["shape"])) == (bits, shape)]
            rows.append(
                (
                    f"int{bits}",
                    f"{shape[0]} x {shape[1]}",
                    *(f"{r['milliseconds']:.3f}" for r in times),
                    f"{times[0]['GB_per_second']:.1f}",
                    f"{times[0]['share_of_read_bandwidth']:.0%}",
                )
            )
    head = ("weights", "N x K", *(f"M={t}" for t in TOKENS if t <= 16), "GB/s at M=1", "of reads")
    print(format_table(head, rows))


def report_models(found: dict[str, Any]) -> None:
    from hfq.table import format_table

    rows = [
        (
            name,
            *(f"{one['tokens_per_second'][task]:.1f}" for task in TASKS),
            f"{one['weights_MiB']:.0f}",
            f"{one['peak_MiB']:.0f}",
        )
        for name, one in found.items()
    ]
    print(format_table(("tokens per second", *TASKS, "weights, MiB", "peak, MiB"), rows))


def report_step(found: dict[str, Any]) -> None:
    from hfq.table import format_table

    tasks = list(found[next(iter(found))]["seconds"])
    rows = [
        (name, *(f"{1e3 * statistics.median(one['seconds'][task]):.1f}" for task in tasks))
        for name, one in found.items()
    ]
    print(format_table(("milliseconds of a step with free products", *tasks), rows))


def report_gradients(found: Sequence[dict[str, Any]]) -> None:
    from hfq.table import format_table

    rows = [
        (
            row["weights"],
            f"{row['shape'][0]} x {row['shape'][1]}",
            str(row["tokens"]),
            f"{row['milliseconds']:.1f}",
            f"{row['bfloat16_milliseconds']:.1f}",
            f"{row['float32_milliseconds']:.1f}",
            f"{row['speed_of_fastest_dense']:.0%}",
        )
        for row in found
    ]
    head = ("gradients", "N x K", "tokens", "milliseconds", "bfloat16", "float32", "of the faster")
    print(format_table(head, rows))


REPORTS: dict[str, Callable[[Any], None]] = {
    "kernels": report_kernels,
    "gradients": report_gradients,
    "models": report_models,
    "avx2": report_models,
    "step": report_step,
}


# ---- pictures


def draw_kernels(found: dict[str, Any]) -> str:
    from hfq.plot import Bars, bars

    rows = [row for row in found["rows"] if row["tokens"] == 1]
    groups = [
        Bars(
            name=f"{shape[0]} x {shape[1]}",
            values=[
                (f"int{row['bits']}", row["share_of_read_bandwidth"])
                for row in rows
                if tuple(row["shape"]) == shape
            ],
        )
        for shape in SHAPES
    ]
    title = "CPU kernels, one token: weights read, as a share of the memory's bandwidth"
    label = f"of {found['read_GB_per_second']:.1f} GB/s"
    return bars(title, label, groups, form=".0%", full=1.0)


def draw_models(found: dict[str, Any]) -> str:
    from hfq.plot import Bars, bars

    names = sorted(found, key=lambda name: not name.startswith("hfq"))  # ours first
    groups = [
        Bars(name=task, values=[(name, found[name]["tokens_per_second"][task]) for name in names])
        for task in TASKS
    ]
    return bars("1B parameters on the CPU", "tokens per second, each task to its own scale", groups)


PICTURES: dict[str, Callable[[Any], str]] = {"kernels": draw_kernels, "models": draw_models}


def draw(results: dict[str, Any]) -> None:
    """A picture of each part that has one, beside the JSON files."""
    import machine

    for part, picture in PICTURES.items():
        if part in results:
            path = machine.RESULTS / f"cpu_{part}.svg"
            path.write_text(picture(results[part]), encoding="utf-8")
            print(f"drawn: {path.name}")


def draw_again() -> None:
    import machine

    for part in PICTURES:
        path = machine.RESULTS / f"cpu_{part}.json"
        draw({part: json.loads(path.read_text())[part]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for package in ("llamacpp", "bitsandbytes", "quanto", "torchao", "gptqmodel", "openvino"):
        parser.add_argument(f"--{package}", metavar="PYTHON", help="interpreter that has it")
    parser.add_argument(
        "--llamacpp-avx2", metavar="PYTHON", help="interpreter whose llama.cpp is built for AVX2"
    )
    parser.add_argument("--work", type=Path, help="folder for models, which are not made again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=REPORTS)
    parser.add_argument("--plot", action="store_true", help="only draw what was measured before")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_models(args.make)
    if args.plot:
        return draw_again()
    import machine
    import torch

    from hfq.kernels import native, ops  # noqa: F401

    torch.set_num_threads(os.cpu_count() or 1)
    status = native.load()
    results: dict[str, Any] = {"isa": status.isa}
    parts = (args.only,) if args.only else tuple(REPORTS)
    if "kernels" in parts:
        results["kernels"] = kernels(args.rounds)
    if "gradients" in parts:
        results["gradients"] = gradients(args.rounds)
    of_models = {"models": models, "avx2": avx2, "step": step}
    if of_models.keys() & set(parts):
        with contextlib.ExitStack() as stack:
            work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            work.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, __file__, "--make", str(work)], check=True)
            results |= {
                part: measure(args, work) for part, measure in of_models.items() if part in parts
            }
    for part, report in REPORTS.items():
        if results.get(part):
            report(results[part])
    name = f"cpu_{args.only}" if args.only else "cpu"
    print(f"written: {machine.write(name, 'python benchmarks/cpu.py', results).name}")
    draw(results)


if __name__ == "__main__":
    main()
