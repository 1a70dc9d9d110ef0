"""Which products take the CUDA kernels with wgmma, and the ladder for a GPU that runs them for the first time. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import wgmma_ladder
from fragments_weights import random_weight as make
from wgmma_products import linear


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "1")
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")


def test_the_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = make(generator, (64, 4096, 32), (4, None))
    x = torch.randn(40, 4096, generator=generator).bfloat16()

    def is_gemm(tokens: int, *device: int) -> bool:
        found: bool = emulator.takes("wgmma", x[:tokens], w.operands, w.sizes, *device)
        return not found

    monkeypatch.delenv("HFQ_CUDA_WGMMA")
    assert not is_gemm(17, 90) and not is_gemm(40, 90)
    assert is_gemm(16, 90)  # a small weight
    assert is_gemm(40, 80)
    assert is_gemm(40, 100)  # which has other instructions
    assert is_gemm(40, 90, 99 << 10)  # too little shared memory
    for capability in (80, 90):  # few tokens need no memory
        assert emulator.workspace_of(x[:8], w.operands, w.sizes, capability) == 0
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "0")
    assert is_gemm(40, 90)
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "1")
    assert not is_gemm(16, 90)
    w.check(linear(emulator, x, w), x)


def test_ladder(emulator: Any, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    rungs = ("identity_rows", "ring", "identity_staged", "identity_pair128", "identity_pair")
    arguments = ["--emulated", str(emulator.folder), *rungs]
    monkeypatch.setattr("sys.argv", ["wgmma_ladder.py", *arguments])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # to be set back
    assert wgmma_ladder.main() == 0
    assert capfd.readouterr().out.splitlines()[-1] == "all right"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: torch.zeros_like(y), "x was not there"),
        (lambda y: torch.full_like(y, torch.nan), "no column"),
        (lambda y: y.roll(1, 1), "the rows in another order"),
        (lambda y: y.roll(1, 0), "what token 1 should have"),
    ],
)
def test_ladder_names_what_is_wrong(
    emulator: Any, capfd: pytest.CaptureFixture[str], change: Any, words: str
) -> None:
    rung = wgmma_ladder.RUNGS["identity_rows"]
    weight = make(torch.Generator().manual_seed(0), rung.shape, rung.kind)
    product, device = wgmma_ladder.product_of(weight, emulator.folder)
    wrong = [lambda x: change(product(x)), device]
    assert not wgmma_ladder.check_identity(rung, weight, *wrong)
    assert words in capfd.readouterr().out
    assert not wgmma_ladder.check_products(rung, weight, *wrong)
