"""Train a LoRA adapter on a packed 4-bit base with plain PEFT, save it, load it, merge it. Runs offline on the CPU.

python examples/lora.py [--steps N] [--format int|nf4|int8]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hfq

MODEL = Path(__file__).parent / "stdlib-llama"
# What the base never saw: modules that were held out of its training.
TEXT = MODEL / "heldout.txt"
WINDOW, BATCH, TRAINED = 256, 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--format", default="int", choices=("int", "nf4", "fp4", "int8"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(args.format, args.steps, Path(scratch))


def run(packed_format: str, steps: int, scratch: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    quantize(packed_format).save_pretrained(scratch / "base")

    base = AutoModelForCausalLM.from_pretrained(scratch / "base", dtype=torch.float32)
    packed_before = {name: t.clone() for name, t in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.print_trainable_parameters()
    windows = token_windows(tokenizer)[:TRAINED]
    print(f"loss before: {mean_loss(model, windows):.3f}")
    train(model, windows, steps)
    print(f"loss after: {mean_loss(model, windows):.3f}")

    changed = [
        n for n, t in base_tensors(model, packed_before) if not torch.equal(t, packed_before[n])
    ]
    print("packed base tensors changed:", changed or "none")
    model.save_pretrained(scratch / "adapter")

    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(scratch / "base", dtype=torch.float32),
        scratch / "adapter",
    )
    expected = logits(model, windows)
    print("largest difference, reloaded:", (logits(again, windows) - expected).abs().max().item())
    hfq.merge_to_float(again)
    merged = again.merge_and_unload()
    print(
        "largest difference, merged to float:",
        (logits(merged, windows) - expected).abs().max().item(),
    )


def quantize(packed_format: str) -> PreTrainedModel:
    config = hfq.HfqConfig(format=packed_format)
    return AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=config, dtype=torch.float32
    )


def token_windows(tokenizer: object) -> Tensor:
    """Windows of the text: int64 `[B, WINDOW]`."""
    ids = tokenizer(TEXT.read_text(), verbose=False)["input_ids"]
    count = len(ids) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def train(model: PeftModel, windows: Tensor, steps: int) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-3)
    model.train()
    for _ in range(steps):
        batch = windows[torch.randint(0, len(windows), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def mean_loss(model: PeftModel, windows: Tensor) -> float:
    """Nats per token over all windows."""
    return model(input_ids=windows, labels=windows).loss.item()


def base_tensors(model: PeftModel, names: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The base's tensors under the names that they had before adapters were put around them."""
    state = model.get_base_model().state_dict()
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    return [(name, plain[name]) for name in names]


@torch.no_grad()
def logits(model: torch.nn.Module, windows: Tensor) -> Tensor:
    return model(input_ids=windows[:1]).logits


if __name__ == "__main__":
    main()
