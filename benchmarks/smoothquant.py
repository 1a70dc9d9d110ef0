"""What activations of 8 bits cost on a model with outlier channels, and what SmoothQuant wins back.

    python benchmarks/smoothquant.py

Large language models have a few channels whose activations are many times larger than all others. The embedded model is
too small to have grown any, so it is given some without changing what it computes: gains of norms, values and up
projections are multiplied in a few channels, and the columns that read them are divided by the same factors. That the
outputs stay the same is checked first. All rows run in float32; the calibration text is the first quarter of the
held-out text, the figures are of the rest.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hfq
from hfq.table import format_table

MODEL = Path(__file__).parent.parent / "examples" / "stdlib-llama"

# int8 unless the name says otherwise.
SETTINGS: dict[str, dict[str, Any]] = {
    "weights only": {"format": "int8"},
    "dynamic": {"format": "int8", "activation": "dynamic"},
    "static": {"format": "int8", "activation": "static"},
    "smoothquant dynamic": {"method": "smoothquant"},
    "smoothquant static": {"method": "smoothquant", "activation": "static"},
    "smoothquant dynamic, 0.5": {"method": "smoothquant", "smoothing": 0.5},
    "smoothquant static, 0.5": {"method": "smoothquant", "activation": "static", "smoothing": 0.5},
    "smoothquant+gptq dynamic": {"method": "smoothquant+gptq"},
    "fp8 weights only": {"format": "fp8"},
    "fp8 dynamic": {"format": "fp8", "activation": "dynamic"},
    "fp8 static": {"format": "fp8", "activation": "static"},
    "fp8 smoothquant dynamic": {
        "method": "smoothquant",
        "format": "fp8",
        "activation": "dynamic",
    },
    "fp8 smoothquant static": {"method": "smoothquant", "format": "fp8", "activation": "static"},
}

# Channels in a hundred that become outliers, and by how much: about what Dettmers et al. ("LLM.int8()", 2022) found.
SHARE, LEAST, MOST = 0.01, 30.0, 100.0


@torch.no_grad()
def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    """A Llama that computes the same with outliers in all activations that its linear layers read."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def factors(channels: int) -> Tensor:
        found = torch.ones(channels)
        chosen = torch.randperm(channels, generator=generator)[: max(1, round(SHARE * channels))]
        spread = torch.rand(len(chosen), generator=generator)
        found[chosen] = LEAST * (MOST / LEAST) ** spread
        return found

    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = factors(norm.weight.shape[0])
            norm.weight.mul_(by)
            for reader in readers:
                reader.weight.div_(by)
        by = factors(mlp.up_proj.out_features)
        mlp.up_proj.weight.mul_(by.unsqueeze(1))
        mlp.down_proj.weight.div_(by)
        by = factors(attention.v_proj.out_features)
        attention.v_proj.weight.mul_(by.unsqueeze(1))
        # Each head of the values is read by several heads of the queries.
        shared = by.view(groups, -1).repeat_interleave(heads // groups, 0).flatten()
        attention.o_proj.weight.div_(shared)
    return model


def check_same(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    """The largest difference of logits over the largest logit; fails where it is more than rounding."""
    with torch.no_grad():
        expected, found = model(ids).logits, other(ids).logits
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-4:
        raise SystemExit(f"the outliers changed the model: logits differ by {difference:.2e}")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, help="read no more of the held-out text")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    cut = len(text) // 4
    calibration = {"dataset": [text[:cut]], "num_samples": 64, "seqlen": 512}
    outliers = with_outliers(reference)
    ids = torch.tensor([tokenizer(text[cut : cut + 2000]).input_ids[:512]])
    difference = check_same(reference, outliers, ids)
    print(f"with outliers the logits differ by {difference:.1e} of the largest\n")

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        outliers.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for kind, path in (("as trained", str(MODEL)), ("with outliers", folder)):
            for name, settings in SETTINGS.items():
                data = calibration if hfq.HfqConfig(**settings).calibrated else {}
                config = hfq.HfqConfig(kernel_mode="exact", **settings, **data)
                model = AutoModelForCausalLM.from_pretrained(
                    path, quantization_config=config, dtype=torch.float32
                )
                result = hfq.evaluate(
                    model,
                    reference,
                    dataset=[text[cut:]],
                    tokenizer=tokenizer,
                    batch_size=4,
                    max_tokens=args.max_tokens,
                    speed=False,
                )
                base = result.reference.perplexity
                rows.append(
                    {
                        "model": kind,
                        "name": name,
                        "perplexity": result.perplexity,
                        "perplexity_loss_percent": 100 * (result.perplexity / base - 1),
                        "kl_nats_per_token": result.kl,
                        "top1_agreement": result.top1_agreement,
                    }
                )
                print(f"{kind}, {name}: {result.perplexity:.4f} of {base:.4f}", flush=True)
    header = ("model", "settings", "perplexity", "loss", "KL, nats", "top-1")
    print("\n" + format_table(header, [_cells(row) for row in rows]))
    command = "python benchmarks/smoothquant.py"
    if args.max_tokens:
        command += f" --max-tokens {args.max_tokens}"
    results = {
        "reference_perplexity": base,
        "outlier_logit_difference": difference,
        "rows": rows,
    }
    print(f"written: {machine.write('smoothquant', command, results).name}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["model"],
        row["name"],
        f"{row['perplexity']:.4f}",
        f"{row['perplexity_loss_percent']:+.2f}%",
        f"{row['kl_nats_per_token']:.5f}",
        f"{100 * row['top1_agreement']:.2f}%",
    )


if __name__ == "__main__":
    main()
