"""A Llama checkpoint in GPTQ's format, rounded to nearest: for speed, where a calibration would take hours.

    python benchmarks/peers/gptq_checkpoint.py MODEL OUT

4 bits, groups of 128, symmetric. The layers of the blocks, as GPTQModel quantizes; head and embeddings stay as they are.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BITS, GROUP = 4, 128
SETTINGS = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": BITS,
    "group_size": GROUP,
    "sym": True,
    "desc_act": False,
}


def packed(weight: Tensor) -> dict[str, Tensor]:
    """Of a weight `[N, K]`: qweight int32 `[K / 8, N]`, qzeros `[G, N / 8]`, scales float16 `[G, N]`, g_idx int32 `[K]`."""
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP, GROUP)
    zero = 1 << (BITS - 1)
    scales = groups.abs().amax(-1).clamp(min=1e-8) / (zero - 1)
    codes = (groups / scales.unsqueeze(-1)).round() + zero
    codes = codes.view(n, k).clamp(0, 2 * zero - 1).long()
    # The format stores zero points less one.
    zeros = torch.full((k // GROUP, n), zero - 1)
    return {
        "qweight": in_words(codes.T),
        "qzeros": in_words(zeros.T).T.contiguous(),
        "scales": scales.T.half().contiguous(),
        "g_idx": (torch.arange(k) // GROUP).int(),
    }


def in_words(codes: Tensor) -> Tensor:
    """`[R, C]` to int32 `[R / 8, C]`, the first row in the lowest bits."""
    shifts = (torch.arange(32 // BITS) * BITS).view(1, -1, 1)
    words = (codes.reshape(-1, 32 // BITS, codes.shape[1]) << shifts).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if "_proj.weight" in name:
                base = name.removesuffix("weight")
                tensors |= {base + part: tensor for part, tensor in packed(value).items()}
            else:
                tensors[name] = value
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    (out / "quantize_config.json").write_text(json.dumps(SETTINGS))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", out)


if __name__ == "__main__":
    main()
