"""The CUDA kernels with wgmma, run on the CPU, against a float64 reference. No GPU is needed: see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
import wgmma_ladder
from fragments_weights import FLOATS, HALVES, KINDS, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_only_bad, check_tokens_are_apart
from wgmma_products import ALONE, CLUSTERS, linear

# (N, K, group_size; 0: one group per row): rows that fill no tile, warpgroup or block; columns that end in a chunk; groups of all kinds.
SHAPES = (
    (1, 8, 0),
    (17, 136, 32),
    (70, 264, 64),
    (130, 520, 128),
    (33, 200, 0),
    (5, 1096, 96),
    (272, 392, 160),
)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "1")
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype, multiprocessors in zip(
        (*HALVES, *HALVES),
        (9, 20, 64, 130),
        (torch.float16, torch.float32, torch.bfloat16, torch.float16),
        (ALONE, CLUSTERS, CLUSTERS, ALONE),
        strict=True,
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias)


@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 31, 32, 33, 63, 65, 100, 128, 129, 257])
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's: neither on those that exist nor on memory where none is."""
    w = make(generator, (76, 648, 64), (4, "zeros"))
    x = torch.randn(tokens, 648, generator=generator).bfloat16()
    check_tokens_are_apart(lambda x: linear(emulator, x, w), w, x, generator)


@pytest.mark.parametrize("splits", range(1, 9))
@pytest.mark.parametrize("tokens", [16, 70])
def test_every_cluster(emulator: Any, generator: torch.Generator, splits: int, tokens: int) -> None:
    """Columns shared out among up to eight blocks, the last one with fewer."""
    w = make(generator, (270, 128 * 2 * splits + 72, 128), (4, None))
    x = torch.randn(tokens, w.sizes[2], generator=generator).half()
    bias = torch.randn(270, generator=generator)
    w.check(linear(emulator, x, w, bias, CLUSTERS), x, bias)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_dtypes(
    emulator: Any,
    generator: torch.Generator,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    for kind, dtype in itertools.product(((4, "zeros"), (8, None)), HALVES):
        w = make(generator, (20, 104, 32), kind, scale_dtype=scale_dtype)
        x = torch.randn(12, 104, generator=generator).to(dtype)
        bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
        w.check(linear(emulator, x, w, bias), x, bias)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    w = make(generator, (20, 136, 64), kind)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = torch.randn(12, 136, generator=generator).to(dtype)
        x[11, column] = bad
        check_only_bad(linear(emulator, x, w), 11)
    x = torch.randn(9, 136, generator=generator).bfloat16()
    check_only_bad(linear(emulator, x, w.with_bad_scale(13, 1), multiprocessors=CLUSTERS).T, 13)


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 256, 0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_combination(
    emulator: Any, generator: torch.Generator, kind: Kind, group_size: int, dtype: torch.dtype
) -> None:
    cases = (((40, 1000), ALONE, (11, 70)), ((17, 1608), CLUSTERS, (33, 16)))
    for (rows, columns), multiprocessors, numbers in cases:
        w = make(generator, (rows, columns, group_size), kind)
        for tokens in numbers:
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            bias = torch.randn(rows, generator=generator) if tokens % 2 else None
            w.check(linear(emulator, x, w, bias, multiprocessors), x, bias)


# ---- the ladder for a GPU that runs these kernels for the first time


def test_ladder(emulator: Any, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    rungs = ("identity_rows", "ring", "identity_large", "identity_staged", "identity_pair")
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
