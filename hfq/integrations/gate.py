"""Loading what was written in a new process, before success is reported.

    python -m hfq.integrations.gate FOLDER TOKENS LOGITS DEVICE

reads token ids from one safetensors file and writes the loaded model's logits to another.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.errors import CheckpointError

__all__ = ["check_reloaded", "logits_of"]

# Reloading gives the same codes to the same kernels. What is left is the order of sums, which a library may choose
# anew each time; a wrong tensor moves logits by orders of magnitude more.
_TOLERANCE = 1e-3


def check_reloaded(
    folder: Path, ids: Tensor, expected: Tensor | None, device: torch.device
) -> float | None:
    """Load the model in `folder` in a new process; the largest difference of its logits, over the largest logit.

    Args:
        ids: int64 `[B, T]`.
        expected: logits of the model in memory, `[B, T, V]`; None where they are not known: then finite ones will do.

    Raises:
        CheckpointError: it cannot be loaded, gives NaN or other logits.
    """
    found = _from_new_process(folder, ids, device)
    if expected is None:
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                "the written model gives NaN or infinite logits; nothing was kept"
            )
        return None
    wanted = expected.float().cpu()
    difference = ((found - wanted).abs().amax() / wanted.abs().amax()).item()
    # Written so that a NaN fails.
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"the written model does not reproduce the quantized one: logits differ by {difference:.1e} of the largest, "
            f"expected at most {_TOLERANCE}; nothing was kept. Please report this model"
        )
    return float(difference)


def _from_new_process(folder: Path, ids: Tensor, device: torch.device) -> Tensor:
    with tempfile.TemporaryDirectory() as temporary:
        tokens, logits = Path(temporary) / "tokens", Path(temporary) / "logits"
        save_file({"ids": ids.cpu()}, tokens)
        words = [sys.executable, "-m", __name__, str(folder), str(tokens), str(logits), str(device)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(
                f"what was written cannot be loaded again: {last}; nothing was kept. Please report this model"
            )
        return load_file(logits)["logits"]


def logits_of(folder: Path, ids: Tensor, device: torch.device) -> Tensor:
    """Logits float32 `[B, T, V]` of the model in `folder`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float().cpu().contiguous()


def _main(folder: str, tokens: str, logits: str, device: str) -> None:
    ids = load_file(tokens)["ids"]
    save_file({"logits": logits_of(Path(folder), ids, torch.device(device))}, logits)


if __name__ == "__main__":
    import hfq  # noqa: F401  (registers the quantizer)

    _main(*sys.argv[1:])
