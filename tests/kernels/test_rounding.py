"""Native code that chooses codes against the PyTorch reference, for every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hfq.core import affine, columns, fit
from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.kernels import native

pytestmark = [
    pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels"),
    pytest.mark.usefixtures("one_thread"),
]

MakeWeight = Callable[..., Tensor]

ISAS = native.load().isas if native.load().cpu else ()
SPECS: list[QuantSpec] = [
    *(IntSpec(bits=bits, group_size=16, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    IntSpec(bits=4, group_size=-1, sym=False, scale_dtype="bfloat16"),
    IntSpec(bits=3, group_size=40, scale_dtype="float32"),
    CodebookSpec(group_size=16),
    CodebookSpec(codebook="fp4", group_size=24, scale_dtype="bfloat16"),
]
# (N, K): single; one row more than a block of lanes; more than a tile, short last groups.
SHAPES = [(1, 1), (17, 33), (70, 90)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


# ---- the best grid of each group


def errors_of(
    weight: Tensor, grid: tuple[Tensor, Tensor], spec: QuantSpec, costs: Tensor
) -> Tensor:
    """Weighted squared errors, float64 `[N, G]`."""
    scales, zeros = grid
    own = None if isinstance(spec, CodebookSpec) or spec.sym else zeros
    points = affine.codebook_of(spec, weight.device)
    groups = affine.group_columns(weight, spec.group_size)
    rounded = affine.grid_points(groups, scales, own, points, spec.bits) * scales.unsqueeze(-1)
    counts = fit.column_costs(groups, weight.shape[1], costs)
    return ((groups - rounded).double().square() * counts).sum(-1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("importance", ["none", "columns", "weights"])
def test_the_search_finds_grids_as_good_as_the_reference(
    isa: str,
    spec: QuantSpec,
    shape: tuple[int, int],
    importance: str,
    heavy_tailed_weight: MakeWeight,
    generator: torch.Generator,
) -> None:
    weight = heavy_tailed_weight(*shape)
    wanted = {"none": (), "columns": shape[1:], "weights": shape}[importance]
    costs = torch.rand(wanted, generator=generator) if wanted else None
    arguments = (
        *(weight, costs, *fit._starts(weight, spec), affine.codebook_of(spec, weight.device)),
        *(spec.bits, spec.group_size, spec.torch_scale_dtype, 5),
    )
    found = torch.ops.hfq.search_grid(*arguments)
    reference = fit._search_grid(*arguments)
    assert torch.equal(found[0], found[0].to(spec.torch_scale_dtype).float())
    counts = torch.ones(shape[1]) if costs is None else costs
    ours, theirs = (errors_of(weight, grid, spec, counts) for grid in (found, reference))
    # Sums in another order end in another local minimum now and then, as often a better one.
    same = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-12).float().mean()
    assert same >= 0.97 if ours.numel() > 30 else bool((ours <= 1.2 * theirs + 1e-12).all())
    assert ours.sum() <= 1.01 * theirs.sum() + 1e-12


def test_degenerate_groups(isa: str) -> None:
    """All zero, all the same, of subnormal size, and weights that count nothing."""
    weight = torch.zeros(5, 16)
    weight[1], weight[2], weight[3] = 0.25, torch.linspace(-1e-40, 1e-40, 16), 1e30
    for spec in (IntSpec(group_size=16), IntSpec(group_size=16, sym=False)):
        for costs in (None, torch.zeros(16)):
            arguments = (
                *(weight, costs, *fit._starts(weight, spec), None),
                *(spec.bits, spec.group_size, spec.torch_scale_dtype, 5),
            )
            found, reference = torch.ops.hfq.search_grid(*arguments), fit._search_grid(*arguments)
            torch.testing.assert_close(found[0], reference[0], rtol=1e-3, atol=0)
            torch.testing.assert_close(found[1], reference[1], rtol=1e-3, atol=1e-3)


# ---- column by column


def rounding(
    spec: QuantSpec, count: int, rows: int, generator: torch.Generator
) -> tuple[object, ...]:
    """Arguments of ``hfq::round_columns`` with as many groups as columns, some of them of scale 0."""
    targets = torch.randn(count, rows, generator=generator)
    origins = targets + 0.1 * torch.randn(count, rows, generator=generator)
    asked = 0.1 * torch.randn(count, count, generator=generator)
    groups = torch.randint(count, (count,), generator=generator, dtype=torch.int32)
    scales = 0.5 * torch.rand(count, rows, generator=generator) - 0.1
    scales[0] = 0
    zeros = None
    if isinstance(spec, IntSpec) and not spec.sym:
        zeros = spec.levels * torch.rand(count, rows, generator=generator)
    points = affine.codebook_of(spec, targets.device)
    return targets, origins, asked, groups, scales, zeros, points, spec.bits


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 63), (33, 65), (128, 130)])
def test_columns_are_rounded_like_the_reference(
    isa: str, spec: QuantSpec, count: int, rows: int, generator: torch.Generator
) -> None:
    arguments = rounding(spec, count, rows, generator)
    codes, changes = torch.ops.hfq.round_columns(*arguments)
    wanted, wanted_changes = columns._round_columns(*arguments)  # type: ignore[arg-type]
    assert codes.dtype == torch.uint8
    # A code that falls the other way, at a tie but for rounding, changes what comes after it in its row.
    same = (codes == wanted).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(changes[:, same], wanted_changes[:, same], rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_gets_a_code(isa: str, generator: torch.Generator) -> None:
    targets, *rest = rounding(IntSpec(), 3, 20, generator)
    codes, _ = torch.ops.hfq.round_columns(torch.full_like(targets, torch.nan), *rest)  # type: ignore[call-overload]
    assert int(codes.max()) < 16


# ---- wrong arguments


def good_columns(generator: torch.Generator) -> dict[str, object]:
    names = ("targets", "origins", "asked", "groups", "scales", "zeros", "codebook", "bits")
    return dict(
        zip(names, rounding(IntSpec(group_size=4, sym=False), 6, 20, generator), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("targets", torch.zeros(20), "targets must be of shape"),
        ("targets", torch.zeros(6, 20, dtype=torch.float64), "targets must be float32"),
        ("targets", torch.zeros(20, 6).T, "targets must be contiguous"),
        ("origins", torch.zeros(6, 19), "origins must be of shape"),
        ("asked", torch.zeros(6, 5), "asked must be of shape"),
        ("groups", torch.zeros(6, dtype=torch.int64), "groups must be int32"),
        ("groups", torch.full((6,), 6, dtype=torch.int32), "groups must be between 0 and G - 1"),
        ("groups", torch.full((6,), -1, dtype=torch.int32), "groups must be between 0 and G - 1"),
        ("scales", torch.zeros(6, 21), "scales must be of shape"),
        ("zeros", torch.zeros(5, 20), "zeros must be of shape"),
        ("codebook", torch.zeros(16), "takes no zeros"),
        ("bits", 9, "bits must be 1 to 8"),
    ],
)
def test_wrong_columns_are_refused(
    name: str, value: object, message: str, generator: torch.Generator
) -> None:
    arguments = good_columns(generator) | {name: value}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hfq.round_columns(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(3, 8, 1), "weight must be of shape"),
        ("weight", torch.zeros(3, 8, dtype=torch.bfloat16), "weight must be float32"),
        ("importance", torch.zeros(7), "importance must be of shape"),
        ("importance", torch.zeros(2, 8), "importance must be of shape"),
        ("scales", torch.zeros(3, 2), "scales must be of shape"),
        ("scales", torch.zeros(0, 3, 2), "scales must be of shape"),
        ("zeros", torch.zeros(1, 3, 2), "zeros must be of shape"),
        ("codebook", torch.zeros(15), "takes no zeros"),
        ("bits", 0, "bits must be 1 to 8"),
        ("group_size", 0, "group_size must be positive or -1"),
        ("dtype", torch.float64, "dtype must be"),
        ("turns", 0, "turns must be positive"),
    ],
)
def test_wrong_searches_are_refused(name: str, value: object, message: str) -> None:
    arguments: dict[str, object] = {
        "weight": torch.ones(3, 8),
        "importance": None,
        "scales": torch.ones(2, 3, 2),
        "zeros": torch.ones(2, 3, 2),
        "codebook": None,
        "bits": 4,
        "group_size": 4,
        "dtype": torch.float16,
        "turns": 3,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hfq.search_grid(*(arguments | {name: value}).values())
