"""Accesses to memory that nothing orders, in a product of each kernel for 4 bits (of format `spqr`, of more than 8 tokens); HFQ_TEST_RACES=1 looks for them in all tests of emulated kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulator import Emulator, build_watched
from fragments_weights import Kind, Shape
from fragments_weights import random_weight as make
from spqr_weights import random_weight as make_spqr

WATCHED = (
    *("gemm.cu", "gemm_int4.cu", "linear_int4.cu", "wgmma_int4.cu", "wgmma_tokens.cu"),
    *("wide_int4.cu", "wide_table4.cu", "spqr_gemm.cu", "spqr_gemm4.cu"),
)
CLUSTERS = 1 << 20  # multiprocessors: as many blocks as are wanted


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest, emulator_folder: Path) -> Emulator:
    if "HFQ_TEST_RACES" in os.environ:  # all of its kernels are watched
        emulator: Emulator = request.getfixturevalue("emulator")
        return emulator
    return build_watched(emulator_folder, WATCHED)


@dataclass(frozen=True)
class Product:
    tokens: int
    shape: Shape
    environment: Mapping[str, str] = field(default_factory=dict)
    kind: Kind = (4, None)
    multiprocessors: int = CLUSTERS
    capability: int = 90
    rounded: bool = False
    digits: bool = False


def _wgmma(value: str) -> dict[str, str]:
    return {"HFQ_CUDA_WGMMA": value, "HFQ_CUDA_WIDE": "0"}


# Stages are used several times, and blocks share columns.
PRODUCTS = {
    "digits": Product(1, (40, 1096, 128), capability=80),
    "linear": Product(5, (40, 1096, 64), kind=(4, "zeros"), capability=80),
    "gemm": Product(40, (70, 1096, 64), kind=(4, "zeros"), capability=80),
    "wide": Product(9, (150, 1096, 64), {"HFQ_CUDA_WIDE": "1"}, (4, "zeros")),
    "wide_digits": Product(
        1,
        (150, 1096, 64),
        {"HFQ_CUDA_WIDE": "1", "HFQ_CUDA_DIGITS": "1"},
        (4, "nf4"),
        digits=True,
    ),
    "staged_16": Product(12, (140, 2120, 64), _wgmma("1"), (4, "zeros"), multiprocessors=3),
    "staged_plain": Product(14, (140, 2120, 128), _wgmma("1"), multiprocessors=3),
    "staged": Product(40, (140, 2120, 128), _wgmma("1"), multiprocessors=3),
    "staged_zeros": Product(40, (140, 2120, 128), _wgmma("1"), (4, "zeros"), multiprocessors=3),
    "staged_rounds": Product(30, (1540, 640, 64), _wgmma("1"), (4, "zeros"), multiprocessors=3),
    "shared": Product(40, (140, 2120, 128), _wgmma("shared"), multiprocessors=2),
    "shared_rounds": Product(
        50, (780, 1280, 64), _wgmma("shared"), (4, "zeros"), multiprocessors=4
    ),
    "pair_128": Product(70, (140, 2120, 64), _wgmma("1"), multiprocessors=4, rounded=True),
    "pair": Product(150, (230, 1608, 64), _wgmma("1"), multiprocessors=4, rounded=True),
    "pair_rounds": Product(130, (780, 640, 64), _wgmma("1"), multiprocessors=6, rounded=True),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_nothing_races(
    watched: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    product = PRODUCTS[name]
    for variable, value in product.environment.items():
        monkeypatch.setenv(variable, value)
    w = make(generator, product.shape, product.kind)
    x = torch.randn(product.tokens, product.shape[1], generator=generator).bfloat16()
    y = watched.linear(
        x, w.operands, None, w.sizes, product.multiprocessors, capability=product.capability
    )
    w.check(y, x, rounded=product.rounded, digits=product.digits)


@pytest.mark.parametrize("tokens", [14, 20, 70])
def test_nothing_races_where_outliers_are_added(
    watched: Any, generator: torch.Generator, tokens: int
) -> None:
    w = make_spqr(generator, (70, 1096, 16), bits=4)
    x = torch.randn(tokens, 1096, generator=generator).bfloat16()
    w.check(watched.spqr_linear(x, w.ready, None, multiprocessors=3), x)
