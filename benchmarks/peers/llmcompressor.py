"""Quantize with llm-compressor in its own environment and write the weights that its own code gives back.

    python benchmarks/peers/llmcompressor.py MODEL TOKENS OUT '{"bits": 4, "method": "gptq"}'

Arguments and result as in `gptqmodel.py` beside this file.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version

# This file has the name of the package: its folder must not be searched first.
sys.path.pop(0)

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

# Its AWQ pins host memory for an accelerator, which raises where there is none.
torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]


def main() -> None:
    path, tokens, out, settings = sys.argv[1:]
    chosen = json.loads(settings)
    ids = load_file(tokens)["tokens"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    arguments = QuantizationArgs(
        num_bits=chosen["bits"],
        strategy="group",
        group_size=chosen.get("group_size", 128),
        symmetric=chosen.get("sym", True),
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    method = AWQModifier if chosen["method"] == "awq" else GPTQModifier
    recipe = method(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {name: p.detach().float().contiguous() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            found = {key: p for key, p in found.items() if not key.startswith(f"{name}.")}
            with torch.no_grad():
                identity = torch.eye(module.in_features)
                found[f"{name}.weight"] = module(identity).T.float().contiguous()
    save_file(
        found,
        out,
        metadata={
            "seconds": str(seconds),
            "peak_bytes": str(peak),
            "version": version("llmcompressor"),
        },
    )


if __name__ == "__main__":
    main()
