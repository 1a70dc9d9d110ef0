"""A model from `from_pretrained` to `generate` with the CUDA kernels, emulated on the CPU; see operators_on_cpu.py.

The argument behind the library: a name in `CASES`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from operators_on_cpu import on_cpu, use_row
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hfq
from hfq.core.weight import Fp8Grid, PackedGrid, SpqrGrid
from hfq.kernels import cuda, cuda_fp8, cuda_int8, cuda_spqr
from hfq.nn.experts import QuantExperts

TRAINED = Path(__file__).parents[3] / "examples/stdlib-llama"
# More than a pass of the kernels for few tokens, and none of its tiles full.
PROMPT, NEW_TOKENS = 19, 5

# Settings, the kernels, and how far logits may be from those of the dequantized model, which has no activations of 8 bits.
CASES: dict[str, tuple[dict[str, Any], type[Any], type[Any], float]] = {
    "int": ({}, PackedGrid, cuda.CudaFragments, 0.02),
    "experts": ({}, PackedGrid, cuda.CudaFragments, 0.02),
    "nf4": ({"format": "nf4"}, PackedGrid, cuda.CudaFragments, 0.02),
    "int8": ({"format": "int8", "activation": "dynamic"}, PackedGrid, cuda_int8.CudaInt8, 0.05),
    "fp8": ({"format": "fp8"}, Fp8Grid, cuda_fp8.CudaFp8Weights, 0.02),
    "fp8 both": ({"format": "fp8", "activation": "dynamic"}, Fp8Grid, cuda_fp8.CudaFp8, 0.08),
    "fp8 widened": (
        {"format": "fp8", "activation": "dynamic"},
        Fp8Grid,
        cuda_fp8.CudaFp8Widened,
        0.08,
    ),
    "spqr": ({"format": "spqr", "bits": 3}, SpqrGrid, cuda_spqr.CudaSpqr, 0.02),
}


def load(name: str, config: hfq.HfqConfig, folder: Path) -> PreTrainedModel:
    if name != "experts":
        folder = TRAINED
    else:
        shape = Qwen3MoeConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
        Qwen3MoeForCausalLM(shape).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )


def generate(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence, and the logits of its new tokens in float32."""
    out = model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.cat(out.logits).float()


def check(name: str, folder: Path) -> None:
    settings, grid, row, bound = CASES[name]
    use_row(grid, on_cpu(row))
    model = load(name, hfq.HfqConfig(**settings), folder)
    assert {weight.kernel for weight in hfq.explain(model).weights} == {row.name}
    has_experts = any(isinstance(module, QuantExperts) for module in model.modules())
    assert has_experts == (name == "experts")

    ids = torch.randint(5, model.config.vocab_size, (1, PROMPT))
    sequences, found = generate(model, ids)
    model.dequantize()
    with torch.no_grad():
        expected = model(sequences[:, :-1]).logits[0, PROMPT - 1 :].float()
    error = (found - expected).abs().amax() / expected.abs().amax()
    assert error < bound, error


if __name__ == "__main__":
    torch.manual_seed(0)
    check(sys.argv[2], Path(sys.argv[3]))
    sys.stdout.write("all checks passed\n")
