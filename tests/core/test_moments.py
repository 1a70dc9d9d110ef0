"""Sums of products of activations against float64, for every dtype that models run in."""

from __future__ import annotations

import pytest
import torch

from hfq.core.moments import SecondMoment


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [3, 1024, 1500])
def test_moments_add_up(
    columns: int, symmetric: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    moment = SecondMoment(columns, torch.device("cpu"), symmetric)
    # A mean far from 0: products of rounded operands would be wrong by a multiple of the tolerance.
    x = [(torch.randn(t, columns, generator=generator) + 3).to(dtype) for t in (1, 70)]
    y = x if symmetric else [torch.randn(each.shape, generator=generator).to(dtype) for each in x]
    for pair in zip(x, y, strict=True):
        moment.add(*pair)
    expected = torch.cat(x).double().T @ torch.cat(y).double() / 71
    torch.testing.assert_close(moment.mean(71).double(), expected, rtol=1e-4, atol=1e-5)
