"""Quantize a trained model to 4 bits, save it, load it in a new process, compare. Runs offline on the CPU.

python examples/demo.py [--format int|nf4|int8] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfq
from hfq import HfqConfig
from hfq.table import format_bytes, format_table

MODEL = Path(__file__).parent / "stdlib-llama"
PROMPT = "def read(self, path):\n"
NEW_TOKENS = 48

# What the second process runs: nothing but `import hfq` and Transformers.
RELOAD = """
import sys, torch, hfq
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
with torch.no_grad():
    logits = model(ids).logits
tokens = model.generate(ids, max_new_tokens=int(sys.argv[4]), do_sample=False)
torch.save({"logits": logits, "tokens": tokens}, sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int", choices=("int", "nf4", "fp4", "int8"))
    parser.add_argument("--out", type=Path, help="keep the quantized model here")
    parser.add_argument("--max-tokens", type=int, default=16384, help="held-out tokens to read")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(args.format, args.out or Path(scratch) / "model", args.max_tokens, Path(scratch))


def run(packed_format: str, out: Path, max_tokens: int, scratch: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)

    start = time.perf_counter()
    config = HfqConfig(format=packed_format)
    quantized = AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=config, dtype=torch.bfloat16
    )
    print(
        f"quantized in {time.perf_counter() - start:.1f} s: {quantized.hf_quantizer.selection.summary()}"
    )
    quantized.save_pretrained(out)
    tokenizer.save_pretrained(out)

    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = quantized(ids).logits
    tokens = quantized.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    reloaded = load_in_new_process(out, ids, scratch)
    same = torch.equal(logits, reloaded["logits"]) and torch.equal(tokens, reloaded["tokens"])

    print("\n--- the quantized model, loaded again, continues " + repr(PROMPT))
    print(tokenizer.decode(reloaded["tokens"][0]))
    print("---\nnew process: logits and generated text are", "identical" if same else "DIFFERENT")
    if not same:
        sys.exit("the reloaded model differs from the one that was saved")

    result = hfq.evaluate(
        quantized, model, dataset=MODEL / "heldout.txt", tokenizer=tokenizer, max_tokens=max_tokens
    )
    print()
    print(result.table())
    on_disk = {"float": MODEL, "quantized": out}
    rows = [
        (name, format_bytes(sum(file.stat().st_size for file in folder.glob("*.safetensors"))))
        for name, folder in on_disk.items()
    ]
    print()
    print(format_table(("on disk", "size"), rows))


def load_in_new_process(folder: Path, ids: torch.Tensor, scratch: Path) -> dict[str, torch.Tensor]:
    """Logits and generated tokens of the saved model, computed elsewhere."""
    torch.save(ids, scratch / "ids.pt")
    command = [
        sys.executable,
        "-P",  # the installed hfq, not a folder of that name here
        "-c",
        RELOAD,
        str(folder),
        str(scratch / "ids.pt"),
        str(scratch / "out.pt"),
    ]
    subprocess.run([*command, str(NEW_TOKENS)], check=True)
    return torch.load(scratch / "out.pt", weights_only=True)


if __name__ == "__main__":
    main()
