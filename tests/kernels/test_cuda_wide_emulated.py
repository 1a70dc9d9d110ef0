"""The CUDA kernels with many rows for each read of x (wide_kernel.h), run on the CPU, against a float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fragments_weights import FLOATS, HALVES, KINDS, Kind, Shape, name_of
from fragments_weights import random_weight as make
from product_checks import check_only_bad, check_tokens_are_apart
from wgmma_products import ALONE, CLUSTERS, linear

# (N, K, group_size; 0: one group per row): rows that fill no tile or thread block, columns that end in a step, groups of half and whole steps.
SHAPES: tuple[Shape, ...] = (
    (1, 8, 0),
    (17, 136, 64),
    (70, 264, 128),
    (130, 520, 192),
    (272, 1096, 0),
    (97, 2056, 256),
)
TOKENS = (1, 2, 7, 8, 9, 16)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_CUDA_WIDE", "1")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_products(emulator: Any, generator: torch.Generator, shape: Shape, kind: Kind) -> None:
    # One thread block for all columns, clusters, and as many as are used at most.
    devices = (ALONE, 4, CLUSTERS)
    for tokens, dtype, scale_dtype, multiprocessors in zip(
        TOKENS, 3 * HALVES, 2 * FLOATS, 2 * devices, strict=True
    ):
        w = make(generator, shape, kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if tokens % 2 else None
        w.check(linear(emulator, x, w, bias, multiprocessors), x, bias)


@pytest.mark.parametrize(
    ("splits", "steps"), list(enumerate((61, 61, 61, 61, 66, 61, 73, 61), start=1))
)
@pytest.mark.parametrize("kind", [(4, None), (4, "nf4"), (8, "zeros")], ids=name_of)
def test_every_cluster(
    emulator: Any, generator: torch.Generator, splits: int, steps: int, kind: Kind
) -> None:
    """Columns shared out among up to eight blocks of four to fourteen warps, some with a step less than others."""
    assert emulator.wide_plan(3, steps, lambda blocks: splits // blocks, **FEW).splits == splits
    w = make(generator, (40, 128 * steps - 56, 128), kind)
    x = torch.randn(11, w.sizes[2], generator=generator).half()
    bias = torch.randn(40, generator=generator)
    w.check(linear(emulator, x, w, bias, splits), x, bias)


# Of a kernel in 4 bits for up to 8 tokens, and for up to 16; of nf4 for up to 8.
FEW = {"tiles": 8, "warps": 16, "warp_bytes": 11264, "table_bytes": 0, "sums_bytes": 7696, "x": 0.7}
MORE = {"tiles": 4, "warps": 16, "warp_bytes": 8704, "table_bytes": 0, "sums_bytes": 5904, "x": 1.4}
TABLE = {
    "tiles": 4,
    "warps": 16,
    "warp_bytes": 7168,
    "table_bytes": 32768,
    "sums_bytes": 3856,
    "x": 0.7,
}
H200 = (
    132,
    66,
    39,
    30,
    22,
    17,
    15,
    15,
)  # clusters at a time, one thread block of each multiprocessor


@pytest.mark.parametrize(
    ("rows", "columns", "few", "more", "table"),
    [
        (14336, 4096, (132, 1, 8, 2), (264, 1, 8, 2), (264, 1, 8, 2)),
        (4096, 14336, (66, 2, 12, 1), (66, 2, 12, 1), (66, 2, 8, 2)),
        (28672, 8192, (264, 1, 8, 2), (528, 1, 4, 4), (528, 1, 8, 0)),
        (1024, 4096, (64, 2, 8, 2), (30, 4, 8, 2), (64, 2, 8, 2)),
    ],
)
def test_plans(
    emulator: Any,
    rows: int,
    columns: int,
    few: tuple[int, int, int, int],
    more: tuple[int, int, int, int],
    table: tuple[int, int, int, int],
) -> None:
    """What was the fastest of all on an H200, or within 5 % of it; the last weight was measured in int4 with few tokens only."""

    def plan(shape: dict[str, float]) -> tuple[int, int, int, int]:
        found = emulator.wide_plan(rows // 16, columns // 128, lambda s: H200[s - 1], **shape)
        return found.groups, found.splits, found.warps, found.room

    assert plan(FEW) == few
    assert plan(MORE) == more
    assert plan(TABLE) == table


@pytest.mark.parametrize("tiles", [1, 7, 131, 132, 133, 1056, 1057, 8016])
@pytest.mark.parametrize("steps", [1, 3, 4, 33])
def test_any_plan_can_be_launched(emulator: Any, tiles: int, steps: int) -> None:
    groups64 = MORE | {"warps": 12, "warp_bytes": 9216}
    shapes = (FEW, MORE, groups64, groups64 | {"table_bytes": 32768})
    for shape, device in itertools.product(
        shapes, (H200, (1,) + (0,) * 7, (7, 3, 2, 1, 1, 1, 1, 0))
    ):
        plan = emulator.wide_plan(tiles, steps, lambda s, d=device: d[s - 1], **shape)
        assert shape["table_bytes"] + plan.warps * shape["warp_bytes"] <= 227 << 10
        assert 1 <= plan.groups <= tiles
        assert -(-tiles // plan.groups) <= shape["tiles"]
        assert plan.warps <= shape["warps"]
        assert plan.splits == 1 or plan.splits * plan.warps <= steps
    assert emulator.wide_plan(tiles, steps, lambda _: 0, **FEW).groups == 0


@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(emulator: Any, generator: torch.Generator, tokens: int) -> None:
    """A token's result depends on no other's: neither on those that exist nor on memory where none is."""
    w = make(generator, (76, 1224, 64), (4, "zeros"))
    x = torch.randn(tokens, 1224, generator=generator).bfloat16()
    check_tokens_are_apart(
        lambda x: linear(emulator, x, w, multiprocessors=CLUSTERS), w, x, generator
    )


@pytest.mark.parametrize("kind", list(itertools.product((2, 4, 8), (None, "zeros"))), ids=name_of)
@pytest.mark.parametrize(("tokens", "group_size"), [(3, 64), (12, 128), (16, 64)])
def test_activations_of_any_size(
    emulator: Any, generator: torch.Generator, kind: Kind, tokens: int, group_size: int
) -> None:
    """They meet codes that are subnormal numbers: a power of two changes nothing but the exponents of the outputs."""
    w = make(generator, (40, 264, group_size), kind)
    x = torch.randn(tokens, 264, generator=generator).bfloat16()
    y = linear(emulator, x, w, multiprocessors=CLUSTERS)
    for power in (-40, 50):
        raised = linear(emulator, x * 2.0**power, w, multiprocessors=CLUSTERS)
        assert torch.equal(raised.double(), y.double() * 2.0**power)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_its_own_outputs(
    emulator: Any, generator: torch.Generator, kind: Kind, bad: float
) -> None:
    w = make(generator, (20, 136, 64), kind)
    for dtype, column in zip(HALVES, (135, 3), strict=True):
        x = torch.randn(13, 136, generator=generator).to(dtype)
        x[11, column] = bad
        check_only_bad(linear(emulator, x, w, multiprocessors=CLUSTERS), 11)
    x = torch.randn(9, 136, generator=generator).bfloat16()
    check_only_bad(linear(emulator, x, w.with_bad_scale(13, 1), multiprocessors=CLUSTERS).T, 13)


def test_the_choice(
    emulator: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_wide(tokens: int, group_size: int, capability: int = 90) -> bool:
        w = make(generator, (64, 4224, group_size), (4, None))
        x = torch.randn(tokens, 4224, generator=generator).bfloat16()
        found: bool = emulator.takes("wide", x, w.operands, w.sizes, capability)
        return found

    for value in ("1", None):
        if value is None:  # more than 8 tokens: whatever the weight's size
            monkeypatch.delenv("HFQ_CUDA_WIDE")
        assert all(is_wide(16, group_size) for group_size in (0, 64, 128, 192, 384))
        assert not is_wide(16, 32) and not is_wide(16, 96)  # scales within 64 columns
        assert not is_wide(17, 128)
        assert not is_wide(16, 128, 80) and not is_wide(16, 128, 100)
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")
    assert not is_wide(16, 128)


@pytest.mark.parametrize(
    ("rows", "tokens", "kind", "expected"),
    [
        (4096, 8, "int4", True),
        (4088, 8, "int4", False),
        (4096, 4, "int4", False),
        (6144, 4, "int4", True),
        (6136, 8, "nf4", False),
        (6144, 8, "nf4", True),
        (6144, 1, "nf4", True),
        (6136, 1, "nf4", False),
        (6144, 1, "int4", False),  # in digits
        (32768, 1, "int4", True),
        (8, 9, "int4", True),
    ],
)
def test_small_weights_are_for_other_kernels(
    emulator: Any,
    rows: int,
    tokens: int,
    kind: str,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 4096 columns."""
    monkeypatch.delenv("HFQ_CUDA_WIDE")
    assert emulator.takes_wide(tokens, (4, 128, 4096, rows), kind) is expected
