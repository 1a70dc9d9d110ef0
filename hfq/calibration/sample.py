"""Calibration text without a data set: sequences sampled from the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError

__all__ = ["TOGETHER", "sample_sequences"]

# Sequences that are sampled side by side: each step reads all weights once, whatever their number.
TOGETHER = 32


@torch.no_grad()
def sample_sequences(
    model: nn.Module,
    count: int,
    seqlen: int,
    seed: int,
    first: int | None,
    vocab_size: int,
    together: int = TOGETHER,
) -> list[Tensor]:
    """Sequences with the model's own probabilities (temperature 1); the caller's random state is not touched.

    Args:
        first: token that sequences begin with (beginning of text); None: one at random for each.
        together: sequences that are sampled side by side.

    Returns:
        int64 `[seqlen]` each.

    Raises:
        CalibrationError: the model gives NaN or infinite logits.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(p.device for p in model.parameters() if not p.is_meta)
    found: list[Tensor] = []
    while len(found) < count:
        rows = min(together, count - len(found))
        if first is None:
            ids = torch.randint(vocab_size, (rows, 1), generator=generator)
        else:
            ids = torch.full((rows, 1), first)
        sequences, past = [ids], None
        while len(sequences) < seqlen:
            output: Any = model(input_ids=ids.to(device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            chances = output.logits[:, -1].float().softmax(-1).cpu()
            if not bool(torch.isfinite(chances).all()):
                raise CalibrationError(
                    "the model gives NaN or infinite logits for its own text: load it in bfloat16 or float32"
                )
            ids = torch.multinomial(chances, 1, generator=generator)
            sequences.append(ids)
        found += list(torch.cat(sequences, dim=1))
    return found
