"""Quantize with GPTQModel in its own environment and write the weights that its own code gives back.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/peers/gptqmodel.py MODEL TOKENS OUT '{"bits": 4, "method": "gptq"}'

TOKENS is a safetensors file with int64 "tokens" `[S, T]`. OUT gets "NAME.weight" float32 `[N, K]` of every layer that was
quantized, all other parameters as they are, and seconds (from loading to the saved checkpoint) and peak memory of the
process in the metadata. Where OUT ends in .json it gets these two only.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# This file has the name of the package: its folder must not be searched first.
sys.path.pop(0)

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def quantize(model: str, tokens: str, settings: dict[str, object], folder: str) -> float:
    if settings.get("method") == "awq":
        settings |= {"method": METHOD.AWQ, "format": FORMAT.GEMM}
    data = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row)}
        for row in load_file(tokens)["tokens"]
    ]
    start = time.perf_counter()
    loaded = GPTQModel.load(model, QuantizeConfig(**settings))
    loaded.quantize(data, batch_size=4)
    loaded.save(folder)
    return time.perf_counter() - start


def weights(folder: str, awq: bool) -> dict[str, Tensor]:
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.TORCH
    model: nn.Module = GPTQModel.load(folder, device="cpu", backend=backend).model
    found = {name: p.detach().float().contiguous() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            found = {key: p for key, p in found.items() if not key.startswith(f"{name}.")}
            with torch.no_grad():
                identity = torch.eye(module.in_features, dtype=torch.float16)
                found[f"{name}.weight"] = module(identity).T.float().contiguous()
    return found


def main() -> None:
    model, tokens, out, settings = sys.argv[1:]
    chosen = json.loads(settings)
    with tempfile.TemporaryDirectory() as folder:
        seconds = quantize(model, tokens, chosen, folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if out.endswith(".json"):
            Path(out).write_text(
                json.dumps(
                    {"seconds": seconds, "peak_bytes": peak, "version": version("gptqmodel")}
                )
            )
            return
        found = weights(folder, chosen.get("method") == METHOD.AWQ)
    save_file(
        found,
        out,
        metadata={
            "seconds": str(seconds),
            "peak_bytes": str(peak),
            "version": version("gptqmodel"),
        },
    )


if __name__ == "__main__":
    main()
