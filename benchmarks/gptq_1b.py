"""GPTQ on some blocks of a 1B-parameter Llama shape: time and peak memory beside GPTQModel, in turn, one run.

    python benchmarks/gptq_1b.py --gptqmodel PYTHON [--blocks 2] [--samples 64] [--rounds 3]

From a float checkpoint on disk to a packed one on disk, each time in a process of its own, with the same tokens and
settings (4 bits, symmetric, groups of 128). hfq's time includes the check of what it wrote by loading it again, whose
memory counts as well. Weights and tokens are random: neither time nor memory depends on their values.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_1b import SHAPE

PEER = Path(__file__).parent / "peers" / "gptqmodel.py"
EXAMPLE = Path(__file__).parents[1] / "examples" / "stdlib-llama"
LENGTH = 512


def make(folder: Path, blocks: int, samples: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": blocks})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "float")
    # GPTQModel wants a tokenizer beside the weights; nothing here uses it.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / "float")
    tokens = torch.randint(SHAPE["vocab_size"], (samples, LENGTH))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")


def ours(folder: Path, refine: int | None) -> None:
    """Quantize with hfq and write what it took."""
    import torch
    from safetensors.torch import load_file

    import hfq

    torch.set_num_threads(os.cpu_count() or 1)
    tokens = list(load_file(folder / "tokens.safetensors")["tokens"])
    config = hfq.HfqConfig(
        method="gptq", dataset=tokens, num_samples=len(tokens), seqlen=LENGTH, refine=refine
    )
    quantize = hfq.quantize  # imports what it needs; imports of the peer are not counted either
    start = time.perf_counter()
    quantize(folder / "float", folder / "packed", config, resume=False)
    seconds = time.perf_counter() - start
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(kind).ru_maxrss * 1024 for kind in kinds)
    (folder / "out.json").write_text(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def measured(command: list[str], folder: Path) -> dict[str, float]:
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads((folder / "out.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--refine", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        return ours(args.ours, args.refine)
    import machine

    from hfq.table import format_table

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In a process of its own: `ru_maxrss` of those measured begins with what this one had when it started them.
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(folder, args.blocks, args.samples)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"making the model failed with exit code {maker.exitcode}")
        here = [sys.executable, __file__, "--ours", str(folder)]
        commands = {
            "hfq": here,
            "hfq, refine=0": [*here, "--refine", "0"],
        }
        if args.gptqmodel:
            commands["GPTQModel"] = [
                *(args.gptqmodel, str(PEER), str(folder / "float")),
                *(str(folder / "tokens.safetensors"), str(folder / "out.json")),
                json.dumps({"method": "gptq", "bits": 4, "group_size": 128, "sym": True}),
            ]
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for number in range(args.rounds):
            for name, command in commands.items():
                rounds[name].append(measured(command, folder))
                print(f"round {number + 1}: {name}: {rounds[name][-1]}", flush=True)
    rows = []
    for name, each in rounds.items():
        seconds = [one["seconds"] for one in each]
        peak = statistics.median(one["peak_bytes"] for one in each) / 2**20
        rows.append(
            (
                name,
                f"{statistics.median(seconds):.1f}",
                f"{min(seconds):.1f} to {max(seconds):.1f}",
                f"{peak:.0f}",
            )
        )
    print(format_table(("", "seconds, median", "spread", "peak memory, MiB"), rows))
    command = f"python benchmarks/gptq_1b.py --gptqmodel PYTHON --blocks {args.blocks} --samples {args.samples}"
    path = machine.write(
        "gptq_1b", command, {"blocks": args.blocks, "samples": args.samples, "rounds": rounds}
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
