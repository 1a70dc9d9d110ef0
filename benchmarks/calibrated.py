"""Calibrated methods beside other people's: perplexity and KL on the embedded model, same calibration tokens for all.

    python benchmarks/calibrated.py --gptqmodel PYTHON --llmcompressor PYTHON [--work FOLDER]

PYTHON is the interpreter of an environment that has the package; peers quantize there (`benchmarks/peers/`) and hand
back the weights that their own code makes of what they stored. Every row is then measured here, in float32, by the
same code, so only the weights differ. Peers' weights are kept in FOLDER and not made again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfq
from hfq.table import format_table

MODEL = Path(__file__).parent.parent / "examples" / "stdlib-llama"
PEERS = Path(__file__).parent / "peers"
SAMPLES, LENGTH = 64, 512

GRIDS = [
    {"bits": bits, "sym": sym, "group_size": 128} for bits in (4, 3, 2) for sym in (False, True)
]
ASYMMETRIC = [grid for grid in GRIDS if not grid["sym"]]
SPQR = [
    {"bits": 4},
    {"bits": 4, "group_size": 64, "outliers": 0.0},
    {"bits": 3},
    {"bits": 3, "group_size": 32},
    {"bits": 3, "group_size": 64, "outliers": 0.0},
    {"bits": 2},
    {"bits": 2, "group_size": 32},
]
OURS: list[dict[str, Any]] = [
    *({"method": "rtn", **grid, "scale_search": True} for grid in GRIDS),
    *({"method": "hqq", **grid} for grid in ASYMMETRIC),
    *({"method": "gptq", **grid} for grid in GRIDS),
    *({"method": "awq", **grid} for grid in GRIDS),
    *({"method": "awq+gptq", **grid} for grid in ASYMMETRIC),
    # The same bits as SpQR's.
    {"method": "gptq", "bits": 3, "sym": True, "group_size": 32},
    {"method": "gptq", "bits": 3, "sym": False, "group_size": 64},
    {"method": "gptq", "bits": 3, "sym": False, "group_size": 32},
    {"method": "gptq", "bits": 2, "sym": False, "group_size": 32},
    *({"method": "spqr", **each} for each in SPQR),
]
THEIRS: dict[str, list[dict[str, Any]]] = {
    "gptqmodel": [
        *({"method": "gptq", **grid} for grid in GRIDS),
        *({"method": "gptq", **grid, "desc_act": True} for grid in ASYMMETRIC),
        *({"method": "awq", **grid} for grid in GRIDS if grid["bits"] == 4),
    ],
    "llmcompressor": [
        *({"method": "gptq", **grid} for grid in ASYMMETRIC),
        *({"method": "awq", **grid} for grid in ASYMMETRIC),
    ],
}


def calibration_tokens() -> Tensor:
    """Tokens of modules that the model was trained on, none of them held out: int64 `[SAMPLES, LENGTH]`."""
    sys.path.append(str(MODEL))
    train = importlib.import_module("train")
    documents, _ = train.split_text(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = []
    for document in random.Random(0).sample(documents, 4 * SAMPLES):
        ids = tokenizer(document, return_tensors="pt").input_ids[0]
        if len(ids) >= LENGTH:
            rows.append(ids[:LENGTH])
    return torch.stack(rows[:SAMPLES])


def peer_weights(
    package: str, python: str, settings: dict[str, Any], tokens: Path, work: Path
) -> Path | None:
    """Let a peer quantize; None where it cannot."""
    name = "-".join([package, *(f"{key}={value}" for key, value in settings.items())])
    out = work / f"{name}.safetensors"
    if not out.exists():
        command = [python, str(PEERS / f"{package}.py"), str(MODEL), str(tokens), str(out)]
        log = work / f"{name}.log"
        environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
        with log.open("w") as stream:
            done = subprocess.run(
                [*command, json.dumps(settings)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
        if done.returncode:
            print(f"{name}: failed, see {log}")
            return None
    return out


def ours(settings: dict[str, Any], tokens: Tensor) -> tuple[nn.Module, float]:
    config = hfq.HfqConfig(kernel_mode="exact", **settings)
    if config.calibrated:
        config.update(dataset=list(tokens), num_samples=SAMPLES, seqlen=LENGTH)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=config, dtype=torch.float32
    )
    return model, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for package in THEIRS:
        parser.add_argument(f"--{package}", metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--work", type=Path, help="folder for the peers' weights")
    parser.add_argument("--max-tokens", type=int, help="read no more of the held-out text")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = calibration_tokens()
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}

    def add(package: str, settings: dict[str, Any], model: nn.Module, seconds: float) -> None:
        result = hfq.evaluate(
            model,
            reference,
            dataset=MODEL / "heldout.txt",
            tokenizer=tokenizer,
            batch_size=4,
            max_tokens=args.max_tokens,
            speed=False,
        )
        rows.append(
            {
                "package": package,
                **settings,
                "bits_per_weight": _bits(model, settings),
                "perplexity": result.perplexity,
                "reference_perplexity": result.reference.perplexity,
                "kl_nats_per_token": result.kl,
                "top1_agreement": result.top1_agreement,
                "seconds": seconds,
            }
        )
        print(_cells(rows[-1]), flush=True)

    for settings in OURS:
        add("hfq", settings, *ours(settings, tokens))
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        file = work / "tokens.safetensors"
        save_file({"tokens": tokens}, file)
        for package, each in THEIRS.items():
            python = getattr(args, package)
            for settings in each if python else ():
                made = peer_weights(package, python, settings, file, work)
                if made is None:
                    continue
                model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
                missing, unexpected = model.load_state_dict(load_file(made), strict=False)
                assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
                with safe_open(made, "pt") as opened:
                    made_by = opened.metadata()
                versions[package] = made_by.get("version", "?")
                add(package, settings, model, float(made_by["seconds"]))
    rows.sort(key=lambda row: (-row["bits_per_weight"], row["kl_nats_per_token"]))
    header = ("package", "method", "grid", "bits", "perplexity", "KL, nats", "top-1", "seconds")
    print(format_table(header, [_cells(row) for row in rows]))
    command = "python benchmarks/calibrated.py" + "".join(
        f" --{package} PYTHON" for package in THEIRS if getattr(args, package)
    )
    if args.max_tokens:
        command += f" --max-tokens {args.max_tokens}"
    path = machine.write("calibrated", command, {"peers": versions, "rows": rows})
    print(f"written: {path.name}")


def _bits(model: nn.Module, settings: dict[str, Any]) -> float:
    """Bits per packed weight, everything counted; peers store float16 scales, and zero points of as many bits."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        bits, zeros = settings["bits"], 0 if settings["sym"] else settings["bits"]
        return float(bits + (16 + zeros) / settings["group_size"])
    stored = count = 0
    for name in quantizer.selection.recipes:
        module = model.get_submodule(name)
        stored += sum(
            8 * t.numel() * t.element_size() for t in module.neutral_tensors("weight").values()
        )
        count += module.in_features * module.out_features
    return stored / count


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    grid = f"{row['bits']} bits g{row.get('group_size', '')}"
    grid += {True: " sym", False: " asym", None: ""}[row.get("sym")]
    if row.get("desc_act"):
        grid += " desc_act"
    if "outliers" in row:
        grid += f" outliers={row['outliers']:.1%}"
    return (
        row["package"],
        row["method"],
        grid,
        f"{row['bits_per_weight']:.2f}",
        f"{row['perplexity']:.3f}",
        f"{row['kl_nats_per_token']:.5f}",
        f"{row['top1_agreement']:.2%}",
        f"{row['seconds']:.0f}",
    )


if __name__ == "__main__":
    main()
