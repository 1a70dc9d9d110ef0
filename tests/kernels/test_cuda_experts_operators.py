"""Experts of formats int8, fp8 and spqr in one launch: rows and operators on the emulated GPU."""

from __future__ import annotations

from typing import Any

import torch


def test_experts_operators(emulator: Any, emulator_module: Any, generator: torch.Generator) -> None:
    seed = int(torch.randint(1 << 31, (), generator=generator))
    emulator_module.check_operators(emulator.folder, "check_experts.py", str(seed))
