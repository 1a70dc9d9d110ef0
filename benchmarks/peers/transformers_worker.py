"""A causal language model in Transformers that is measured on request, in whatever environment has its package.

    python benchmarks/peers/transformers_worker.py KIND MODEL

KIND: bfloat16, hfq (MODEL is packed), bitsandbytes, quanto, quanto-int8, torchao-int8, gptqmodel (MODEL is in its format), openvino
(through optimum-intel, 4 bits in groups of 128, converted at the first call and kept in a folder beside MODEL).
hfq-plain leaves the model's own code alone, and with -free behind it products give zeros.
It answers each line of its input with a line of JSON; see `worker.serve`.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from typing import Any

from worker import PROMPT, serve

# The folder has files with the names of packages.
sys.path.pop(0)

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


def load(kind: str, path: str) -> Any:
    if kind == "openvino":
        return load_openvino(path)
    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    if kind.startswith("hfq"):
        import hfq

        if "plain" in kind:
            settings["quantization_config"] = hfq.HfqConfig(decode_kernels=False)
        if "free" in kind:
            from hfq.kernels.cpu import CpuRows16

            CpuRows16.linear = zeros
    elif kind == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        settings["device_map"] = "cpu"
    elif kind.startswith("quanto"):
        from transformers import QuantoConfig

        settings["quantization_config"] = QuantoConfig(
            weights="int8" if kind.endswith("int8") else "int4"
        )
    elif kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "gptqmodel":
        settings["device_map"] = "cpu"
    elif kind != "bfloat16":
        raise SystemExit(f"unknown kind {kind!r}")
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


def load_openvino(path: str) -> Any:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    made = f"{path}-openvino"
    if not os.path.isdir(made):
        settings = OVWeightQuantizationConfig(bits=4, group_size=128, sym=True, ratio=1.0)
        new = OVModelForCausalLM.from_pretrained(path, export=True, quantization_config=settings)
        new.save_pretrained(made)
    return OVModelForCausalLM.from_pretrained(made)


def weights_bytes(model: Any, path: str) -> int:
    """Bytes of all parameters and buffers, or of the file that has them."""
    if not isinstance(model, torch.nn.Module):
        return os.path.getsize(f"{path}-openvino/openvino_model.bin")
    held = {t.data_ptr(): t.numel() * t.element_size() for t in model.parameters()}
    held |= {t.data_ptr(): t.numel() * t.element_size() for t in model.buffers()}
    return sum(held.values())


def zeros(row: Any, x: torch.Tensor, grid: Any, *_: Any) -> torch.Tensor:
    """A product that costs nothing."""
    return x.new_zeros((*x.shape[:-1], grid.out_features))


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Never stops; remembers when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def measure(model: Any, task: str, batch: int, tokens: int) -> float:
    """Seconds of a prompt of `tokens` tokens ("prefill"), or the median second of a step of `generate` ("decode")."""
    generator = torch.Generator().manual_seed(0)
    length = tokens if task == "prefill" else PROMPT
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    if task == "prefill":
        with torch.no_grad():
            # Where the head cannot be asked for one token, it runs for all.
            last = {"logits_to_keep": 1} if isinstance(model, torch.nn.Module) else {}
            start = time.perf_counter()
            model(ids, attention_mask=torch.ones_like(ids), use_cache=True, **last)
            return time.perf_counter() - start
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return statistics.median(b - a for a, b in itertools.pairwise(clock.times))


def main() -> None:
    kind, path = sys.argv[1:]
    torch.set_num_threads(os.cpu_count() or 1)
    model = load(kind, path)
    # All tokens that were asked for, without the work of looking for an end, which llamacpp_worker.py does not do either.
    model.generation_config.eos_token_id = None
    about = {"weights_MiB": weights_bytes(model, path) / 2**20, "torch": torch.__version__}
    serve(lambda *task: measure(model, *task), about)


if __name__ == "__main__":
    main()
