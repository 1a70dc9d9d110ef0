"""Products of format ``spqr`` with more than 8 tokens (kernels/cuda/spqr_gemm.h), run on the CPU, against float64. No GPU is needed.

What holds for any number of tokens is in test_cuda_spqr_emulated.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, Shape, name_of
from spqr_weights import BITS, SHAPES, STATS, activations, prepared
from spqr_weights import random_weight as make

from hfq.core import bits as bit_packing

# Several blocks of rows, or many rounds.
LONG = ((280, 1032, 16), (20, 2056, 128))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG], ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, bits: int) -> None:
    for stats, tokens, dtype, stat_dtype in zip(
        STATS, (9, 17, 64, 70, 16), HALVES * 3, FLOATS * 2, strict=False
    ):
        w = make(generator, shape, bits=bits, stats=stats, dtype=stat_dtype)
        x = activations(generator, tokens, shape[1], dtype)
        bias = torch.randn(shape[0], generator=generator) if tokens % 2 else None
        w.check(emulator.spqr_linear(x, w.ready, bias), x, bias)


@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 24, 32, 33, 50, 64, 65, 129])
@pytest.mark.parametrize(("group_size", "bits"), [(16, 3), (0, 4)])
def test_every_number_of_tokens(
    emulator: Any, generator: torch.Generator, tokens: int, group_size: int, bits: int
) -> None:
    w = make(generator, (37, 328, group_size), bits=bits)
    x = activations(generator, tokens, 328, torch.bfloat16)
    bias = torch.randn(37, generator=generator)
    y = emulator.spqr_linear(x, w.ready, bias)
    w.check(y, x, bias)
    assert torch.equal(y, emulator.spqr_linear(x, w.ready, bias)), "sums are in one order"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("outliers", [0.02, 0.0])
def test_every_cut(emulator: Any, generator: torch.Generator, bits: int, outliers: float) -> None:
    """Few and many multiprocessors: warps side by side in rows or in columns, one thread block for all columns or several."""
    w = make(generator, (290, 2184, 16), bits=bits, outliers=outliers)
    for tokens, multiprocessors, kib in itertools.product((12, 40), (1, 2, 7, 132), (99, 163, 227)):
        x = activations(generator, tokens, 2184, torch.bfloat16)
        w.check(emulator.spqr_linear(x, w.ready, None, multiprocessors, kib << 10), x)


@pytest.mark.parametrize("bits", BITS)
def test_codes_behind_the_columns_do_not_matter(
    emulator: Any, generator: torch.Generator, bits: int
) -> None:
    """With the last group's scale they would be infinite in float16, and infinity times an activation of zero is not zero."""
    w = make(generator, (16, 1032, 16), bits=bits, outliers=0.0, dtype=torch.float32)
    codes = bit_packing.unpack(w.neutral.qweight.squeeze(-1), bits, 1032)
    codes[:, 1024:] = 0
    stats = w.neutral.stats.clone()
    stats[:, -1] = torch.tensor([0.0, 7e4, 0.0, 0.0])  # codes times 70000
    packed = bit_packing.pack(codes, bits).unsqueeze(-1)
    ready = prepared(replace(w.neutral, qweight=packed, stats=stats))
    x = activations(generator, 9, 1032, torch.float16)
    assert emulator.spqr_linear(x, ready, None, multiprocessors=1).isfinite().all()
