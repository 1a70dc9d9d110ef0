"""What pairs of thread blocks multiply (wgmma_pair.h): weights rounded to 16 bits (wgmma_rounded.h), and x in order (wgmma_tokens.cu), run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, ROUNDING, Kind, name_of
from fragments_weights import random_weight as make
from torch import Tensor
from wgmma_products import PAIR, arranged, arranged_floats, linear


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "pairs")


def _weights(emulator: Any, weight: Any, dtype: torch.dtype) -> Tensor:
    """What is multiplied `[N, K]`: outputs of tokens that are one at one column, at most 128 at a time."""
    halves = torch.eye(weight.sizes[2], dtype=dtype).chunk(2)
    return torch.cat([linear(emulator, half, weight, multiprocessors=PAIR) for half in halves]).T


# ---- the order of x


@pytest.mark.parametrize(
    ("tile", "shape"),
    [
        *((128, shape) for shape in ((65, 8), (127, 136), (128, 128), (90, 392), (70, 1096))),
        *((256, shape) for shape in ((129, 8), (256, 136), (257, 392), (700, 1096))),
    ],
)
def test_x_is_put_in_order(
    emulator: Any, generator: torch.Generator, tile: int, shape: tuple[int, int]
) -> None:
    """Bits are copied, whatever they mean; what does not exist is zero. Nothing is written behind the workspace."""
    x = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)
    assert torch.equal(emulator.arranged(x, arranged_floats(*shape, tile)), arranged(x, tile))


# ---- weights


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_are_rounded_as_they_should(
    emulator: Any, generator: torch.Generator, kind: Kind, dtype: torch.dtype
) -> None:
    """To the bit; those of the reference but for scales in two parts."""
    for scale_dtype, group_size in zip(FLOATS, (32, 64, 0), strict=True):
        w = make(generator, (270, 136, group_size), kind, scale_dtype=scale_dtype)
        assert torch.equal(_weights(emulator, w, dtype), w.rounded(dtype))


@pytest.mark.parametrize("kind", [(4, None), (8, None), (8, "e4m3")], ids=name_of)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scales_in_two_parts_are_nearly_as_good(
    emulator: Any,
    generator: torch.Generator,
    kind: Kind,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    """Each weight is a neighbour of its product, and the nearest one if that is not within 2^-15 of the middle."""
    w = make(generator, (256, 136, 32), kind, scale_dtype=scale_dtype)
    exact, weights = w.values * w.scales, _weights(emulator, w, dtype)
    other = weights != w.reference(dtype)
    assert other.float().mean() < 0.02 if dtype == torch.bfloat16 else not other.any()
    error = (weights.double() - exact).abs()
    # (Half of the smallest float16: some weights are subnormal.)
    least = 2.0**-25 if dtype == torch.float16 else 0.0
    assert (error <= exact.abs() * (ROUNDING[dtype] + 2.0**-15) + least).all()
    # By the middle, both are equally far.
    far = (w.reference(dtype).double() - exact).abs()
    assert (error - far <= exact.abs() * 2.0**-14)[other].all()


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, (2e-6, 1e4)), (torch.bfloat16, (1e-30, 1e30))]
)
def test_small_and_large_scales(
    emulator: Any, generator: torch.Generator, dtype: torch.dtype, largest: tuple[float, float]
) -> None:
    """In float16 the small ones give subnormal weights."""
    for scale_dtype, largest_scale in zip((torch.float32, torch.bfloat16), largest, strict=True):
        for kind in ((2, None), (4, "nf4")):
            w = make(generator, (20, 136, 32), kind, scale_dtype, largest_scale)
            assert torch.equal(_weights(emulator, w, dtype), w.rounded(dtype))
