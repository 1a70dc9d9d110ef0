"""The tables, built again from their definitions."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from hfq.core.codebooks import CODEBOOKS, codebook


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_codebook_is_an_ascending_table_in_the_unit_interval(name: str) -> None:
    values = codebook(name)
    assert values.dtype == torch.float32 and values.shape == (16,)
    assert bool((values.diff() >= 0).all())
    assert values[0] == -1 and values[-1] == 1
    assert (values == 0).sum() == 1


def test_nf4_holds_the_quantiles_of_a_normal_distribution() -> None:
    """Evenly spaced probabilities from d to 1/2 (8 values) and from 1/2 to 1 - d (9 values, the first is the
    same 0), d = (1/30 + 1/32) / 2; the quantiles, divided by the largest.

    QLoRA, section 3; spelled out in Yoshida, "NF4 Isn't Information Theoretically Optimal", 2023, section 2.
    """
    tail = (1 / 30 + 1 / 32) / 2
    below = [tail + (0.5 - tail) * i / 7 for i in range(8)]
    above = [0.5 + (0.5 - tail) * i / 8 for i in range(1, 9)]
    quantiles = [NormalDist().inv_cdf(p) for p in (*below, *above)]
    expected = torch.tensor([quantile / quantiles[-1] for quantile in quantiles])
    # The published values were computed with a tail rounded to seven digits, in float32.
    torch.testing.assert_close(codebook("nf4"), expected, atol=2e-6, rtol=0)


def test_fp4_holds_every_value_of_e2m1() -> None:
    """One sign, two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal."""
    values = set()
    for pattern in range(16):
        sign, exponent, mantissa = pattern >> 3, pattern >> 1 & 3, pattern & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        values.add((-size if sign else size) / 6)
    expected = torch.tensor(sorted(values))
    assert torch.equal(codebook("fp4").unique(), expected)
