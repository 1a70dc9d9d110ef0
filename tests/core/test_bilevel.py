"""Scales that are quantized in blocks of rows: codes, steps and offsets, and the search among codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.bilevel import decode_bilevel, encode_bilevel
from hfq.core.errors import ConfigError
from hfq.core.fit import fit_grid
from hfq.core.fit_bilevel import fit_bilevel_grid
from hfq.core.outliers import collect_outliers, largest, largest_of_pieces
from hfq.core.spec import SCALE_BLOCK, IntSpec, SpqrSpec, outlier_count

MakeWeight = Callable[..., Tensor]


@pytest.mark.parametrize("rows", [1, 7, 8, 20])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_values_are_as_near_as_even_steps_allow(
    rows: int, scale_dtype: str, generator: torch.Generator
) -> None:
    spec = SpqrSpec(stat_bits=4, stat_group_size=8, scale_dtype=scale_dtype)
    values = torch.rand(rows, 5, generator=generator) + 0.5
    stored = encode_bilevel(values, spec)
    assert stored.codes.shape == values.shape and stored.codes.max() < 16
    assert stored.step.shape == stored.offset.shape == (-(-rows // 8), 5)
    assert stored.step.dtype == stored.offset.dtype == spec.torch_stat_dtype
    decoded = decode_bilevel(stored, 8)
    for block in range(-(-rows // 8)):
        part = slice(8 * block, 8 * block + 8)
        span = values[part].amax(0) - values[part].amin(0)
        # The grid that spans the range is among those that were tried.
        even = (span / 15 / 2 + 0.01).square() * len(values[part])
        assert bool(((decoded[part] - values[part]).square().sum(0) <= even).all())


def test_a_line_is_kept_exactly() -> None:
    spec = SpqrSpec(stat_bits=3, stat_group_size=8)
    values = 0.25 + 0.125 * torch.arange(8.0).unsqueeze(1)
    assert torch.equal(decode_bilevel(encode_bilevel(values, spec), 8), values)
    equal = torch.full((8, 2), 0.75)
    assert torch.equal(decode_bilevel(encode_bilevel(equal, spec), 8), equal)


def test_what_counts_more_is_nearer(generator: torch.Generator) -> None:
    spec = SpqrSpec(stat_bits=2, stat_group_size=16)
    values, importance = torch.rand(16, 50, generator=generator), torch.ones(16, 50)
    importance[:4] = 100
    plain, weighted = (
        (decode_bilevel(encode_bilevel(values, spec, costs), 16) - values).square()
        for costs in (None, importance)
    )
    assert weighted[:4].sum() < 0.5 * plain[:4].sum()


def test_values_beyond_float16_are_refused() -> None:
    values = torch.tensor([[1e6], [2e6]])
    with pytest.raises(ConfigError, match="use scale_dtype='float32'"):
        encode_bilevel(values, SpqrSpec())
    decoded = decode_bilevel(encode_bilevel(values, SpqrSpec(scale_dtype="float32")), 64)
    torch.testing.assert_close(decoded, values)


def test_the_search_makes_good_for_some_of_the_second_rounding(
    heavy_tailed_weight: MakeWeight, generator: torch.Generator
) -> None:
    weight, spec = heavy_tailed_weight(128, 64), SpqrSpec(outliers=0)
    costs = torch.rand(128, 64, generator=generator) + 0.1

    def error(quantized: affine.StoredGrid) -> float:
        codes = affine.round_to_grid(weight, quantized.scales, quantized.float_zeros, spec)
        rounded = quantized.weight(codes, spec).dequantize()
        return float(((rounded - weight).square() * costs).sum())

    single = fit_grid(weight, IntSpec(bits=3, group_size=16, sym=False), costs)
    best = error(affine.StoredGrid(scales=single[0], zeros=single[1]))
    rounded = error(affine.store_grid(*fit_grid(weight, spec, costs), spec))
    found = error(fit_bilevel_grid(weight, spec, costs))
    assert best < found < 0.95 * rounded and found < 1.5 * best


def test_what_does_not_count_does_not_widen_the_grid(random_weight: MakeWeight) -> None:
    weight, spec = random_weight(64, 32), SpqrSpec(outliers=0)
    costs = torch.ones(64, 32)
    costs[:, 3] = 0
    spiky = weight.clone()
    spiky[:, 3] = 100
    plain, grid = (fit_bilevel_grid(each, spec, costs) for each in (weight, spiky))
    assert torch.equal(plain.scales, grid.scales)


# ---- outliers


def test_outliers_are_counted_in_pieces() -> None:
    spec = SpqrSpec(outliers=0.013)
    for rows in (0, 1, 255, 256, 257, 1000):
        pieces = [SCALE_BLOCK] * (rows // SCALE_BLOCK) + [rows % SCALE_BLOCK]
        assert outlier_count(spec, rows, 37) == sum(outlier_count(spec, n, 37) for n in pieces)
        assert abs(outlier_count(spec, rows, 37) - 0.013 * rows * 37) <= len(pieces) / 2


def test_the_largest_scores_are_chosen(generator: torch.Generator) -> None:
    scores = torch.rand(300, 9, generator=generator)
    chosen = largest(scores, 40)
    assert int(chosen.sum()) == 40 and scores[chosen].min() > scores[~chosen].max()
    spec = SpqrSpec(outliers=0.05)
    pieces = largest_of_pieces(scores, spec)
    assert torch.equal(pieces[:SCALE_BLOCK], largest_of_pieces(scores[:SCALE_BLOCK], spec))
    assert int(pieces.sum()) == outlier_count(spec, 300, 9)


def test_outliers_come_back_where_they_were(generator: torch.Generator) -> None:
    differences = torch.randn(20, 9, generator=generator)
    chosen = torch.rand(20, 9, generator=generator) < 0.2
    for spec, columns in (
        (SpqrSpec(), torch.int16),
        (SpqrSpec(scale_dtype="float32"), torch.int16),
    ):
        outliers = collect_outliers(chosen, differences, spec)
        assert outliers.columns.dtype == outliers.counts.dtype == columns
        found = torch.zeros(20, 9)
        outliers.add_to(found)
        expected = torch.where(chosen, differences.to(spec.torch_stat_dtype).float(), 0.0)
        assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match="an outlier of 1e"):
        collect_outliers(chosen, torch.full((20, 9), 1e6), SpqrSpec())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sym": True}, "stores zero points"),
        ({"stat_bits": 1}, "stat_bits must be an integer from 2 to 8"),
        ({"stat_group_size": 3}, "stat_group_size must divide 256"),
        ({"outliers": 0.2}, "outliers must be a share from 0 to 0.1"),
        ({"outliers": True}, "outliers must be"),
        ({"bits": 9}, "bits must be an integer from 2 to 8"),
    ],
)
def test_specs_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpqrSpec(**settings)  # type: ignore[arg-type]
