"""Runs of `hfq.quantize` with GPTQ, and what they wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hfq
from hfq import HfqConfig
from hfq.integrations.card import CARD
from hfq.integrations.report import REPORT

from .tiny_models import QUICK

HELD_OUT = torch.arange(34).view(2, 17)


def gptq(tokens: Tensor, **settings: Any) -> HfqConfig:
    merged = {"group_size": 32, "num_samples": 24, "kernel_mode": "exact", **QUICK, **settings}
    return HfqConfig("gptq", dataset=tokens, **merged)


def run(source: Path, output: Path, config: HfqConfig, **settings: Any) -> hfq.Report:
    return hfq.quantize(source, output, config, dtype="float32", **settings)


def digests(folder: Path) -> dict[str, str]:
    """Of all files that do not tell how long it took."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.name not in (REPORT, CARD)
    )
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
