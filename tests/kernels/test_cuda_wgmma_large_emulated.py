"""Large blocks with wgmma, for which weights are rounded to 16 bits and x is put in order before (wgmma_large.h, wgmma_tokens.cu), run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, ROUNDING, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_only_bad, check_tokens_are_apart
from torch import Tensor
from wgmma_products import ALONE, CLUSTERS, arranged, arranged_floats, linear

# (N, K, group_size; 0: one group per row): rows that fill no tile, warpgroup or block; columns that end in a chunk; groups of all kinds.
SHAPES = (
    (1, 8, 0),
    (17, 136, 32),
    (70, 264, 64),
    (270, 520, 128),
    (33, 200, 0),
    (5, 1096, 96),
    (272, 392, 160),
)
TILE = 128  # tokens of a stage


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "large")


def _weights(emulator: Any, weight: Any, dtype: torch.dtype) -> Tensor:
    """What is multiplied `[N, K]`: outputs of tokens that are one at one column, at most 128 at a time."""
    halves = torch.eye(weight.sizes[2], dtype=dtype).chunk(2)
    return torch.cat([linear(emulator, half, weight) for half in halves]).T


# ---- the order of x


@pytest.mark.parametrize(
    ("tile", "shape"),
    [
        *((TILE, shape) for shape in ((65, 8), (127, 136), (128, 128), (90, 392), (70, 1096))),
        # Of pairs.
        *((256, shape) for shape in ((129, 8), (256, 136), (257, 392), (700, 1096))),
    ],
)
def test_x_is_put_in_order(
    emulator: Any, generator: torch.Generator, tile: int, shape: tuple[int, int]
) -> None:
    """Bits are copied, whatever they mean; what does not exist is zero. Nothing is written behind the workspace."""
    x = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)
    assert torch.equal(emulator.arranged(x, arranged_floats(*shape, tile)), arranged(x, tile))


# ---- which products, and their workspace


def test_the_choice(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, and the memory for x, are for more than 64 tokens with weights of more than 2^25 numbers, where the kernel runs."""
    monkeypatch.delenv("HFQ_CUDA_WGMMA")
    small, large = (4, 128, 4096, 8192), (4, 128, 4104, 8192)
    assert emulator.workspace(65, large, 90) == arranged_floats(65, 4104, TILE)
    assert emulator.workspace(128, large, 90) == arranged_floats(128, 4104, TILE)
    assert emulator.workspace(65, small, 90) == 0
    assert emulator.workspace(64, large, 90) not in (0, arranged_floats(64, 4104, TILE))
    gemm = [emulator.workspace(65, large, *device) for device in ((80,), (90, 99 << 10))]
    assert arranged_floats(65, 4104, TILE) not in gemm  # another GPU; too little shared memory
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "0")
    assert emulator.workspace(65, large, 90) == gemm[0]
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "1")
    assert emulator.workspace(65, large, 90) == arranged_floats(65, 4104, TILE)
    assert emulator.workspace(65, small, 90) == 0
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "large")
    assert emulator.workspace(65, small, 90) == arranged_floats(65, 4096, TILE)
    assert emulator.workspace(64, small, 90) not in (0, arranged_floats(64, 4096, TILE))
    assert emulator.workspace(8, large, 90) == 0


@pytest.mark.parametrize("wanted", ["1", "large"])
def test_the_launch_makes_the_same_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """Outputs for ones and zeros tell whether weights were rounded. (A workspace that is too small is an error of the emulator.)"""
    monkeypatch.setenv("HFQ_CUDA_WGMMA", wanted)
    w = make(generator, (20, 136, 32), (8, None), scale_dtype=torch.float32)
    for tokens in (64, 65, 128):
        x = torch.zeros(tokens, 136, dtype=torch.float16)
        x[:, :2] = 1
        exact = (w.values * w.scales)[:, :2].sum(1).half()
        is_exact = torch.equal(linear(emulator, x, w), exact.expand(tokens, -1))
        assert is_exact == (wanted == "1" or tokens == 64), tokens


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


# ---- products


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    for dtype, tokens, scale_dtype, multiprocessors in zip(
        HALVES, (65, 128), (torch.float16, torch.float32), (CLUSTERS, ALONE), strict=True
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens == 65 else None
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias, rounded=True)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dtypes(
    emulator: Any, generator: torch.Generator, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    for kind, bias_dtype in (((4, None), torch.float32), ((3, "zeros"), torch.bfloat16)):
        w = make(generator, (276, 264, 32), kind, scale_dtype=scale_dtype)
        x = torch.randn(70, 264, generator=generator).to(dtype)
        bias = torch.randn(276, generator=generator).to(bias_dtype)
        w.check(linear(emulator, x, w, bias, CLUSTERS), x, bias, rounded=True)


@pytest.mark.parametrize("tokens", [65, 66, 72, 100, 127, 128])
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's."""
    for extra in (None, "zeros"):
        w = make(generator, (276, 648, 64), (4, extra))
        x = torch.randn(tokens, 648, generator=generator).bfloat16()
        check_tokens_are_apart(lambda x, w=w: linear(emulator, x, w), w, x, generator, rounded=True)


@pytest.mark.parametrize("splits", range(1, 9))
def test_every_cluster(emulator: Any, generator: torch.Generator, splits: int) -> None:
    w = make(generator, (270, 128 * 2 * splits + 72, 128), (4, None))
    x = torch.randn(120, w.sizes[2], generator=generator).half()
    bias = torch.randn(270, generator=generator)
    w.check(linear(emulator, x, w, bias, CLUSTERS), x, bias, rounded=True)


def test_each_stage_is_used_many_times(emulator: Any, generator: torch.Generator) -> None:
    for kind in ((4, None), (8, "zeros"), (4, "nf4")):
        w = make(generator, (40, 27 * 128 + 72, 128), kind)
        x = torch.randn(70, w.sizes[2], generator=generator).bfloat16()
        w.check(linear(emulator, x, w), x, rounded=True)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    for dtype, scale_dtype, column in (
        *((dtype, dtype, 135) for dtype in HALVES),
        (torch.bfloat16, torch.float16, 3),
    ):
        w = make(generator, (20, 136, 64), kind, scale_dtype=scale_dtype)
        x = torch.randn(70, 136, generator=generator).to(dtype)
        x[11, column] = bad
        check_only_bad(linear(emulator, x, w), 11)
        x[11, column] = 0
        check_only_bad(linear(emulator, x, w.with_bad_scale(13, 1), multiprocessors=CLUSTERS).T, 13)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 256, 0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_combination(
    emulator: Any, generator: torch.Generator, kind: Kind, group_size: int, dtype: torch.dtype
) -> None:
    cases = (((40, 1000), ALONE, 65), ((270, 1608), CLUSTERS, 128))
    for ((rows, columns), multiprocessors, tokens), scale_dtype in zip(
        cases, (torch.float16, torch.bfloat16), strict=True
    ):
        w = make(generator, (rows, columns, group_size), kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator)
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias, rounded=True)
