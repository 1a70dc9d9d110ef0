"""What `hfq.plan` predicts beside what `hfq.quantize` then takes: seconds, memory, disk. Random weights.

    python benchmarks/plan.py [--blocks 3] [--method gptq] [--target-bits 3.5] [--small]

The model has a few blocks of the 1B Llama shape of benchmarks/llama_1b.py; `--small` is a quarter as wide. Each step is a
process of its own, so that peaks are its own; disk use is watched from outside while it runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
SMALL = {
    **SHAPE,
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
}


def make(folder: Path, blocks: int, small: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL if small else SHAPE), num_hidden_layers=blocks)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def config(args: argparse.Namespace) -> Any:
    import torch

    import hfq

    vocabulary = (SMALL if args.small else SHAPE)["vocab_size"]
    data: dict[str, Any] = {}
    if args.target_bits is not None or args.method not in ("rtn", "hqq"):
        generator = torch.Generator().manual_seed(0)
        size = (args.sequences + 8, args.seqlen)
        tokens = torch.randint(vocabulary, size, generator=generator)
        data = {"dataset": tokens, "num_samples": args.sequences, "seqlen": args.seqlen}
    return hfq.HfqConfig(args.method, bits=args.bits, target_bits=args.target_bits, **data)


def predict(args: argparse.Namespace) -> dict[str, Any]:
    import hfq

    start = time.perf_counter()
    plan = hfq.plan(args.folder / "float", config(args), output=args.folder / "out")
    print(plan.table(), file=sys.stderr)
    return {
        "plan_seconds": time.perf_counter() - start,
        "seconds": plan.forecast.total_seconds,
        "parts": dict(plan.forecast.seconds),
        "memory": plan.forecast.peak_memory,
        "memory_parts": dict(plan.forecast.memory),
        "output_bytes": plan.bytes_after,
        "disk": plan.temporary_bytes,
    }


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    import hfq

    start, processor = time.perf_counter(), time.process_time()
    hfq.quantize(args.folder / "float", args.folder / "out", config(args), resume=False)
    written = (args.folder / "out").glob("*.safetensors")
    return {
        "seconds": time.perf_counter() - start,
        # Without the new process of the check; on one thread, what a busy machine does not change.
        "processor_seconds": time.process_time() - processor,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "output_bytes": sum(path.stat().st_size for path in written),
    }


def watched(words: list[str], folder: Path) -> dict[str, Any]:
    """The JSON of a step, with the most bytes that `folder` held; files with two names count once."""
    child, most = subprocess.Popen(words, stdout=subprocess.PIPE, text=True), 0
    while child.poll() is None:
        sizes = {}
        for path in folder.rglob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            sizes[status.st_ino] = status.st_size if path.is_file() else 0
        most = max(most, sum(sizes.values()))
        time.sleep(0.02)
    output, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    # A plan predicts disk use and has none.
    return {"disk": most, **json.loads(output.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="scratch space (default: a temporary folder)")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--target-bits", type=float)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--small", action="store_true", help="a quarter as wide")
    parser.add_argument("--dry", action="store_true", help="write no JSON")
    parser.add_argument("--step", choices=("make", "predict", "quantize"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "make":
        make(args.folder / "float", args.blocks, args.small)
    elif args.step:
        print(json.dumps({"predict": predict, "quantize": quantize}[args.step](args)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            compare(args, args.folder or Path(temporary))


def compare(args: argparse.Namespace, folder: Path) -> None:
    import machine

    flags = [word for word in sys.argv[1:] if word != "--dry"]
    words = [sys.executable, __file__, *flags, "--folder", str(folder), "--step"]
    subprocess.run([*words, "make"], check=True)
    predicted = watched([*words, "predict"], folder / "out")
    measured = watched([*words, "quantize"], folder / "out")
    print(f"processor, without the check: {measured['processor_seconds']:.1f} s")
    for name in ("seconds", "memory", "disk", "output_bytes"):
        ratio = predicted[name] / measured[name]
        print(
            f"{name}: predicted {predicted[name]:.4g}, measured {measured[name]:.4g}, {ratio:.2f}"
        )
    if not args.dry:
        name = f"plan_{args.method}" + ("_target" if args.target_bits else "")
        command = f"python benchmarks/plan.py {' '.join(flags)}".rstrip()
        found = {"predicted": predicted, "measured": measured}
        print(machine.write(name, command, found).name)


if __name__ == "__main__":
    main()
