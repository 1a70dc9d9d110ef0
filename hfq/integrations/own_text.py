"""Calibration text of the model's own for `hfq.quantize`, whether or not the float model fits into memory.

Each token is sampled from what the whole model makes of those before it. Where the float model fits, it is loaded once
and samples as in ``from_pretrained``. Where it does not, its blocks are read from disk for every token: all sequences are
sampled side by side and are short, because a run would take days otherwise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..calibration.sample import TOGETHER
from ..config import HfqConfig
from ..diagnose.machine import available_memory
from ..evaluation.logits import position_limit
from ..table import format_bytes
from .calibrated import sample
from .mapped_files import return_free_memory
from .resume import fingerprint_of_files
from .source import FloatCheckpoint
from .staging import SaveError

__all__ = ["OwnText", "own_sequences", "own_text"]

logger = logging.get_logger(__name__)

# Tokens of each sequence where every token costs a pass over the files.
_SHORT = 64

# Share of the free memory that the float model and its keys and values may take.
_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """How text will be sampled.

    Attributes:
        count, seqlen: sequences, and tokens of each.
        together: sequences that are sampled side by side.
        streamed: each token reads the float model from disk: it does not fit into memory.
        free: bytes of memory, None where nobody can tell.
        bytes: of memory that keys, values and, if it is not streamed, the float model take.
    """

    count: int
    seqlen: int
    together: int
    streamed: bool
    free: int | None
    bytes: int

    @property
    def passes(self) -> int:
        """Runs of the whole model."""
        return -(-self.count // self.together) * (self.seqlen - 1)


def own_text(source: FloatCheckpoint, config: HfqConfig) -> OwnText:
    """What `own_sequences` will do, with the memory that is free now."""
    count = config.num_samples
    seqlen = min(config.seqlen, position_limit(source.model) or config.seqlen)
    free = available_memory(source.device)
    cache = TOGETHER * seqlen * _bytes_per_token(source)
    needed = source.float_bytes + cache
    streamed = free is not None and needed > _SHARE * free
    if streamed:
        seqlen = min(seqlen, _SHORT)
        needed = count * seqlen * _bytes_per_token(source)
    return OwnText(
        count=count,
        seqlen=seqlen,
        together=count if streamed else TOGETHER,
        streamed=streamed,
        free=free,
        bytes=needed,
    )


def own_sequences(source: FloatCheckpoint, config: HfqConfig, kept: Path) -> list[Tensor]:
    """Sequences sampled from the float model, int64 `[T]`.

    Args:
        kept: a file that keeps them: a run that goes on must have the same, at no cost.

    Raises:
        CalibrationError: the model gives NaN or infinite logits.
        SaveError: the file cannot be written.
    """
    parts = [
        fingerprint_of_files(source.files),
        source.dtype,
        config.num_samples,
        config.seqlen,
        config.seed,
    ]
    key = hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()
    found = _read(kept, key)
    if found is None:
        found = _sampled(source, config)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            numbered = {f"{index:06d}": tokens for index, tokens in enumerate(found)}
            save_file(numbered, kept, metadata={"of": key})
        except (OSError, SafetensorError) as error:
            raise SaveError(f"could not write {kept}: {error}") from error
    return found


def _read(kept: Path, key: str) -> list[Tensor] | None:
    try:
        with safe_open(kept, framework="pt") as file:
            if file.metadata() == {"of": key}:
                return [file.get_tensor(name) for name in sorted(file.keys())]
    except (OSError, SafetensorError):
        pass
    return None


def _sampled(source: FloatCheckpoint, config: HfqConfig) -> list[Tensor]:
    text = own_text(source, config)
    if not text.streamed:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=source.dtype, device_map={"": source.device}
        )
        model.eval()  # type: ignore[no-untyped-call]
        found = sample(model, config, text.seqlen, text.together)
        del model
        return_free_memory()
        return found
    assert text.free is not None
    wanted = min(config.seqlen, position_limit(source.model) or config.seqlen)
    logger.warning(
        f"hfq: no dataset is given, and the float model ({format_bytes(source.float_bytes)}) does not fit into the free "
        f"memory ({format_bytes(text.free)}): {text.count} sequences of {text.seqlen} tokens are sampled from it, for which "
        f"it is read {text.passes} times from disk. Sequences of {wanted} tokens of real text (dataset=...) calibrate better "
        "and cost nothing"
    )
    return sample(source.float_model(), config, text.seqlen, text.together)


def _bytes_per_token(source: FloatCheckpoint) -> int:
    """Of keys and values in all layers."""
    text: Any = source.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * source.dtype.itemsize)
