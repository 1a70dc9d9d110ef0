"""A 1B-parameter Llama shape through `from_pretrained`: time, peak memory, decode speed against bfloat16. One run.

    python benchmarks/llama_1b.py [--folder SCRATCH] [--format int|nf4|int8]

Each measurement is a process of its own, so that peaks are its own; hfq and bfloat16 decode in turn in one process.
Weights are random (speed and memory do not depend on their values).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
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
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
PROMPT, STEPS, ROUNDS = 128, 24, 5


def make(folder: Path) -> None:
    """The float checkpoint, once."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).save_pretrained(
        folder
    )


def quantize(source: Path, target: Path, packed_format: str) -> dict[str, Any]:
    """Quantize while loading: seconds and MiB above the interpreter with its libraries."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfq

    before = _warm()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=hfq.HfqConfig(format=packed_format), dtype=torch.bfloat16
    )
    seconds, peak = time.perf_counter() - start, _peak() - before
    packed = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2 / 2**20
    model.save_pretrained(target)
    return {
        "seconds": seconds,
        "peak_MiB": peak,
        "packed_MiB": packed,
        "largest_float_tensor_MiB": largest,
        "peak_over_packed_plus_largest": peak / (packed + largest),
    }


def load(target: Path) -> dict[str, Any]:
    """Load packed: seconds and MiB above the interpreter."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfq  # noqa: F401

    before = _warm()
    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    return {"seconds": time.perf_counter() - start, "peak_MiB": _peak() - before}


def decode(source: Path, target: Path) -> dict[str, Any]:
    """Tokens per second at batch 1 after a prompt, packed and bfloat16 in turn; medians over rounds."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfq

    models = {
        "hfq": AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16),
        "bfloat16": AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
    }
    ids = torch.randint(
        0, SHAPE["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0)
    )
    rates: dict[str, list[float]] = {name: [] for name in models}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            first, step = _decode_once(model, ids)
            prefill[name].append(PROMPT / first)
            rates[name].append(1 / step)
    ratios = [a / b for a, b in zip(rates["hfq"], rates["bfloat16"], strict=True)]
    return {
        "decode_tokens_per_second": {
            name: statistics.median(values) for name, values in rates.items()
        },
        "prefill_tokens_per_second": {
            name: statistics.median(values) for name, values in prefill.items()
        },
        "decode_ratio_to_bfloat16": statistics.median(ratios),
        "decode_ratios": ratios,
        "kernels": sorted({row.kernel for row in hfq.explain(models["hfq"]).weights}),
    }


def _decode_once(model: Any, ids: Any) -> tuple[float, float]:
    """(seconds of the prompt, median seconds of a step)."""
    import torch

    with torch.no_grad():
        start = time.perf_counter()
        output = model(ids, use_cache=True)
        first = time.perf_counter() - start
        steps = []
        for _ in range(STEPS):
            start = time.perf_counter()
            output = model(ids[:, -1:], past_key_values=output.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - start)
    return first, statistics.median(steps)


def _warm() -> float:
    """Import and start everything that is not the model; the peak so far in MiB."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)
    return _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hfq-llama-1b")
    parser.add_argument("--format", default="int")
    parser.add_argument(
        "--step", choices=("make", "quantize", "load", "decode"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    source, target = args.folder / "float", args.folder / f"packed-{args.format}"
    if args.step:
        steps = {
            "make": lambda: make(source),
            "quantize": lambda: quantize(source, target, args.format),
            "load": lambda: load(target),
            "decode": lambda: decode(source, target),
        }
        print(json.dumps(steps[args.step]()))
        return
    import machine

    results = {}
    for step in (
        ("quantize", "load", "decode")
        if source.exists()
        else ("make", "quantize", "load", "decode")
    ):
        command = [
            sys.executable,
            __file__,
            "--folder",
            str(args.folder),
            "--format",
            args.format,
            "--step",
            step,
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[step] = json.loads(output.splitlines()[-1])
        print(step, json.dumps(results[step], indent=2), flush=True)
    results.pop("make", None)
    command = f"python benchmarks/llama_1b.py --format {args.format}"
    print(machine.write(f"llama_1b_{args.format}", command, {"shape": SHAPE, **results}).name)


if __name__ == "__main__":
    main()
