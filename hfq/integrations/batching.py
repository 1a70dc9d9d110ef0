"""How many tokens run through a block at a time: what the free memory allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..calibration.sequences import MOST_TOKENS
from ..diagnose.machine import available_memory
from ..nn.experts import expert_weights, is_fused_experts

__all__ = ["batch_tokens", "batches"]

# Of the free memory: blocks, statistics and packed tensors take theirs beside the activations.
_SHARE = 0.25

# Float32 tensors of the widest layer's size that exist at a time: gate, up, their product, what statistics read.
_COPIES = 5


def batch_tokens(
    model: nn.Module, device: torch.device, *, logits: bool, processes: int = 1
) -> int:
    """A power of two up to `MOST_TOKENS`, so that it does not change with every byte of free memory.

    Args:
        model: its weights may be on meta.
        logits: the batch runs through the output head as well.
        processes: that share the memory.
    """
    free = available_memory(device)
    if free is None:
        return MOST_TOKENS
    room = _SHARE * free / processes / (4 * _COPIES * _widest(model, logits))
    return min(MOST_TOKENS, 1 << max(0, int(room).bit_length() - 1))


def batches(
    model: nn.Module, device: torch.device, *, head: bool, processes: int = 1
) -> dict[str, int]:
    """Tokens at a time, by kind of data.

    Args:
        head: what stands behind the blocks is calibrated, too.
    """
    return {
        kind: batch_tokens(model, device, logits=logits, processes=processes)
        for kind, logits in {"calibration": head, "held out": False}.items()
    }


def _widest(model: Any, logits: bool) -> int:
    """Columns of the largest activation of a token."""
    text = model.config.get_text_config()
    widest = [text.vocab_size if logits else text.hidden_size]
    for module in model.modules():
        if is_fused_experts(module):
            chosen = getattr(text, "num_experts_per_tok", None) or 1
            widest += [chosen * max(n, k) for _, n, k in expert_weights(module).values()]
        elif isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            widest += [module.in_features, module.out_features]
        elif isinstance(module, Conv1D):
            widest += list(module.weight.shape)
    return int(max(widest))
