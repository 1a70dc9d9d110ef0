"""What quantization costs on the embedded model: perplexity and KL of hfq, bitsandbytes and HQQ, one run.

    python benchmarks/accuracy.py

Every row runs in float32 with the weights that the tool's own code gives back, so only the weights differ. Rows of
bitsandbytes and HQQ need those packages (in an environment of their own, beside hfq); missing ones are named.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfq
from hfq.table import format_table

MODEL = Path(__file__).parent.parent / "examples" / "stdlib-llama"

# name -> (settings, what is measured beside it)
OURS: dict[str, dict[str, Any]] = {
    "hfq int8": {"format": "int8"},
    "hfq fp8": {"format": "fp8"},
    "hfq int4 g128 rtn": {"bits": 4, "group_size": 128},
    "hfq int4 g128 rtn, scale_search": {"bits": 4, "group_size": 128, "scale_search": True},
    "hfq int4 g128 asym, scale_search": {
        "bits": 4,
        "group_size": 128,
        "sym": False,
        "scale_search": True,
    },
    "hfq int4 g128 hqq": {"method": "hqq", "group_size": 128},
    "hfq int4 g64 rtn, scale_search": {"bits": 4, "group_size": 64, "scale_search": True},
    "hfq int4 g64 asym, scale_search": {
        "bits": 4,
        "group_size": 64,
        "sym": False,
        "scale_search": True,
    },
    "hfq int4 g64 hqq": {"method": "hqq", "group_size": 64},
    "hfq nf4 g64": {"format": "nf4"},
    "hfq nf4 g64, scale_search": {"format": "nf4", "scale_search": True},
    "hfq nf4 g64, double_quant": {"format": "nf4", "double_quant": True},
    "hfq fp4 g64": {"format": "fp4"},
    "hfq int3 g128 rtn, scale_search": {"bits": 3, "scale_search": True},
    "hfq int3 g64 asym, scale_search": {
        "bits": 3,
        "group_size": 64,
        "sym": False,
        "scale_search": True,
    },
    "hfq int3 g64 hqq": {"method": "hqq", "bits": 3, "group_size": 64},
}


def bitsandbytes_weight(kind: str, double_quant: bool) -> Callable[[Tensor], Tensor]:
    from bitsandbytes import functional

    def through(weight: Tensor) -> Tensor:
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=double_quant
        )
        return functional.dequantize_4bit(packed, state).view_as(weight)

    return through


def hqq_weight(bits: int, group_size: int) -> Callable[[Tensor], Tensor]:
    from hqq.core.quantize import Quantizer

    def through(weight: Tensor) -> Tensor:
        packed, meta = Quantizer.quantize(
            weight,
            nbits=bits,
            group_size=group_size,
            axis=1,
            optimize=True,
            device="cpu",
            compute_dtype=torch.float32,
        )
        return Quantizer.dequantize(packed, meta).view_as(weight).float()

    return through


def peers() -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes nf4 g64"] = bitsandbytes_weight("nf4", False)
        found["bitsandbytes nf4 g64, double quant"] = bitsandbytes_weight("nf4", True)
        found["bitsandbytes fp4 g64"] = bitsandbytes_weight("fp4", False)
    if importlib.util.find_spec("hqq"):
        for bits, group_size in ((8, 64), (4, 64), (4, 128), (3, 64)):
            found[f"hqq int{bits} g{group_size}"] = hqq_weight(bits, group_size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, help="read no more of the held-out text")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def measure(model: nn.Module) -> hfq.Evaluation:
        return hfq.evaluate(
            model,
            reference,
            dataset=MODEL / "heldout.txt",
            tokenizer=tokenizer,
            batch_size=4,
            max_tokens=args.max_tokens,
            speed=False,
        )

    rows: list[dict[str, Any]] = []

    def add(name: str, model: nn.Module, bits: float | None) -> None:
        result = measure(model)
        base = result.reference.perplexity
        rows.append(
            {
                "name": name,
                "perplexity": result.perplexity,
                "perplexity_loss_percent": 100 * (result.perplexity / base - 1),
                "kl_nats_per_token": result.kl,
                "top1_agreement": result.top1_agreement,
                "packed_bits_per_weight": bits,
            }
        )
        print(f"{name}: {result.perplexity:.4f} of {base:.4f}, KL {result.kl:.5f}", flush=True)

    for name, settings in OURS.items():
        config = hfq.HfqConfig(kernel_mode="exact", **settings)
        model = AutoModelForCausalLM.from_pretrained(
            MODEL, quantization_config=config, dtype=torch.float32
        )
        add(name, model, _packed_bits(model))
    names = set(hfq_weights(model))
    for name, through in peers().items():
        model = copy.deepcopy(reference)
        with torch.no_grad():
            for module_name in names:
                weight = model.get_submodule(module_name).weight
                weight.copy_(through(weight.detach().clone()))
        add(name, model, None)
    print()
    header = ("weights", "bits", "perplexity", "loss", "KL, nats", "top-1")
    print(format_table(header, [_cells(row) for row in rows]))
    for package in ("bitsandbytes", "hqq"):
        if not importlib.util.find_spec(package):
            print(f"{package} is not installed: its rows are missing")
    reference_perplexity = rows[0]["perplexity"] / (1 + rows[0]["perplexity_loss_percent"] / 100)
    command = "python benchmarks/accuracy.py"
    if args.max_tokens:
        command += f" --max-tokens {args.max_tokens}"
    path = machine.write(
        "accuracy", command, {"reference_perplexity": reference_perplexity, "rows": rows}
    )
    print(f"written: {path.name}")


def hfq_weights(model: nn.Module) -> list[str]:
    """Names of the Linears that hfq packs: the peers get the same ones."""
    return list(model.hf_quantizer.selection.recipes)


def _packed_bits(model: nn.Module) -> float:
    """Bits per packed weight, scales included."""
    bits = count = 0
    for name in hfq_weights(model):
        module = model.get_submodule(name)
        bits += 8 * sum(
            t.numel() * t.element_size() for t in module.neutral_tensors("weight").values()
        )
        count += module.in_features * module.out_features
    return bits / count


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bits = row["packed_bits_per_weight"]
    return (
        row["name"],
        "" if bits is None else f"{bits:.2f}",
        f"{row['perplexity']:.4f}",
        f"{row['perplexity_loss_percent']:+.3f}%",
        f"{row['kl_nats_per_token']:.5f}",
        f"{100 * row['top1_agreement']:.2f}%",
    )


if __name__ == "__main__":
    main()
