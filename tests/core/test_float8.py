"""E4M3: values against the formula of the specification, rounding against a search among all values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfq.core.float8 import E4M3, E4M3_MAX, e4m3_values, has_nan, to_e4m3

NAN, INF = float("nan"), float("inf")

# All bytes but those of NaN.
CODES = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)


def value(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa / 512 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code > 127 else size


def nearest(values: Tensor) -> Tensor:
    """By search: float32 `[T]` -> the values of E4M3, float64, ties to an even mantissa."""
    codes = torch.arange(127)
    sizes = torch.tensor([value(int(code)) for code in codes], dtype=torch.float64)
    # An odd mantissa counts as a little further away than it is.
    distances = (values.double().abs().unsqueeze(-1) - sizes).abs() * (
        1 + (codes & 1).double() * 1e-12
    )
    return sizes[distances.argmin(-1)] * values.double().sign()


def test_every_byte_has_the_value_of_the_formula() -> None:
    expected = [value(int(code)) for code in CODES]
    assert e4m3_values(CODES).dtype == torch.float32
    assert e4m3_values(CODES).tolist() == expected
    assert e4m3_values(CODES).tolist() == CODES.view(E4M3).float().tolist()
    assert max(expected) == E4M3_MAX and e4m3_values(CODES[:0]).shape == (0,)


def test_values_are_read_wherever_the_bytes_lie() -> None:
    table = CODES[:240].view(12, 20)
    expected = torch.tensor([value(int(code)) for code in CODES[:240]]).view(12, 20)
    for part in (slice(None), slice(3, None)):
        assert torch.equal(e4m3_values(table[part]), expected[part])
    assert torch.equal(e4m3_values(table[1:, 3:]), expected[1:, 3:])
    assert torch.equal(e4m3_values(table.T), expected.T)


def test_a_value_keeps_its_byte() -> None:
    assert torch.equal(to_e4m3(e4m3_values(CODES)).view(torch.uint8), CODES)


def test_rounding_is_to_nearest_and_to_even(generator: torch.Generator) -> None:
    sizes = 2.0 ** (torch.rand(20_000, generator=generator) * 24 - 14)
    values = sizes * torch.randn(20_000, generator=generator).sign()
    for each in (values, values.bfloat16().float()):
        assert torch.equal(to_e4m3(each).float().double(), nearest(each))
    sorted_values = e4m3_values(CODES).unique()
    ties = (sorted_values[1:] + sorted_values[:-1]) / 2
    assert torch.equal(to_e4m3(ties).float().double(), nearest(ties))
    for direction in (INF, -INF):
        beside = ties.nextafter(torch.full_like(ties, direction))
        assert torch.equal(to_e4m3(beside).float().double(), nearest(beside))


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_what_is_too_large_saturates(count: int) -> None:
    """Casts have other code for a few values than for many."""
    for size in (448.1, 463.9, 464.0, 464.1, 480.0, 1e30, INF):
        for sign in (1, -1):
            found = to_e4m3(torch.full((count,), sign * size)).float()
            assert found.tolist() == [sign * E4M3_MAX] * count


def test_nan_is_nan() -> None:
    codes = to_e4m3(torch.tensor([1.0, NAN])).view(torch.uint8)
    assert codes[1] & 127 == 127
    assert e4m3_values(torch.tensor([1, 127, 128, 255], dtype=torch.uint8)).isnan().tolist() == [
        *(False, True),
        *(False, True),
    ]
    assert has_nan(codes) and not has_nan(codes[:1]) and not has_nan(codes[:0])
    assert has_nan(torch.tensor([3, 255], dtype=torch.uint8)) and not has_nan(CODES)
