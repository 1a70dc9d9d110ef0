"""Loading what was written in a new process, before success is reported; there its speed is measured as well.

    python -m hfq.integrations.gate FOLDER TOKENS LOGITS SPEED DEVICE KERNEL_MODE

reads token ids from one safetensors file, writes the loaded model's logits to another, and then its speed as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from ..core.errors import CheckpointError
from ..evaluation.speed import Speed, measure_speed_within_limit
from ..nn.packed import PackedModule
from . import decode

__all__ = ["check_reloaded", "logits_of"]

logger = logging.get_logger(__name__)

# Reloading gives the same codes to the same kernels. What is left is the order of sums, which a library may choose
# anew each time; a wrong tensor moves logits by orders of magnitude more.
_TOLERANCE = 1e-3

# Tokens before the decoding that is timed.
_PROMPT = 128


def check_reloaded(
    folder: Path,
    ids: Tensor,
    expected: Tensor | None,
    device: torch.device,
    kernel_mode: str = "auto",
) -> tuple[float | None, Speed | None]:
    """Load the model in `folder` in a new process.

    Args:
        ids: int64 `[B, T]`.
        expected: logits of the model in memory, `[B, T, V]`; None where they are not known: then finite ones will do.
        kernel_mode: of the model in memory; checkpoints do not name one.

    Returns:
        The largest difference of its logits, over the largest logit (None if nothing was expected), and its speed.

    Raises:
        CheckpointError: it cannot be loaded, gives NaN or other logits.
    """
    found, speed = _from_new_process(folder, ids, device, kernel_mode)
    if expected is None:
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                "the written model gives NaN or infinite logits; nothing was kept"
            )
        return None, speed
    wanted = expected.float().cpu()
    difference = ((found - wanted).abs().amax() / wanted.abs().amax()).item()
    # Written so that a NaN fails.
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"the written model does not reproduce the quantized one: logits differ by {difference:.1e} of the largest, "
            f"expected at most {_TOLERANCE}; nothing was kept. Please report this model"
        )
    return float(difference), speed


def _from_new_process(
    folder: Path, ids: Tensor, device: torch.device, kernel_mode: str
) -> tuple[Tensor, Speed | None]:
    with tempfile.TemporaryDirectory() as temporary:
        tokens, logits, speed = (Path(temporary) / name for name in ("tokens", "logits", "speed"))
        save_file({"ids": ids.cpu()}, tokens)
        paths = [str(path) for path in (folder, tokens, logits, speed)]
        words = [sys.executable, "-m", __name__, *paths, str(device), kernel_mode]
        done = subprocess.run(words, capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if not logits.is_file():
            raise CheckpointError(
                f"what was written cannot be loaded again: {last}; nothing was kept. Please report this model"
            )
        if done.returncode:
            logger.warning(f"hfq: the speed of the written model could not be measured: {last}")
            return load_file(logits)["logits"], None
        return load_file(logits)["logits"], Speed(**json.loads(speed.read_text()))


def logits_of(folder: Path, ids: Tensor, device: torch.device, kernel_mode: str) -> Tensor:
    """Logits float32 `[B, T, V]` of the model in `folder`, by its own code: so were those that they are compared with."""
    return _logits(_loaded(folder, device, kernel_mode), ids)


def _loaded(folder: Path, device: torch.device, kernel_mode: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    # A `quantization_config` of ours would say both as well, and Transformers would warn that the file has one.
    decode.remove(model)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.kernel_mode = kernel_mode
    return model


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu().contiguous()


def _main(folder: str, tokens: str, logits: str, speed: str, device: str, kernel_mode: str) -> None:
    ids = load_file(tokens)["ids"]
    model = _loaded(Path(folder), torch.device(device), kernel_mode)
    # Complete or not there: the speed is worth less than the run.
    save_file({"logits": _logits(model, ids)}, f"{logits}.partial")
    os.replace(f"{logits}.partial", logits)
    decode.install(model)
    found = measure_speed_within_limit(model, ids[0, :_PROMPT])
    Path(speed).write_text(json.dumps(asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    import hfq  # noqa: F401  (registers the quantizer)

    _main(*sys.argv[1:])
