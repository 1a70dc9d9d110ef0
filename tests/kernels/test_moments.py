"""Sums of products of activations against float64, for every dtype that models run in and every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfq.kernels import native
from hfq.kernels.moments import SecondMoment

AMX = pytest.mark.skipif(
    "avx512_amx" not in native.load().isas, reason="no matrix units, or not built for them"
)


def activations(tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    """With a mean far from 0: products of rounded operands would be wrong by a multiple of the tolerance."""
    return torch.randn(tokens, columns, generator=generator) + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [3, 1024, 1500])
@pytest.mark.usefixtures("isa_or_reference")
def test_moments_add_up(
    columns: int, symmetric: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    moment = SecondMoment(columns, torch.device("cpu"), symmetric)
    x = [activations(tokens, columns, generator).to(dtype) for tokens in (1, 70)]
    y = x if symmetric else [torch.randn(each.shape, generator=generator).to(dtype) for each in x]
    for pair in zip(x, y, strict=True):
        moment.add(*pair)
    expected = torch.cat(x).double().T @ torch.cat(y).double() / 71
    torch.testing.assert_close(moment.mean(71).double(), expected, rtol=1e-4, atol=1e-5)


# Single; a strip of 16 columns more or less than pairs and bands of them; tokens around a tile and around a pass.
@AMX
@pytest.mark.parametrize("columns", [1, 16, 17, 32, 129, 250, 400])
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 4096, 4163])
def test_matrix_units_at_odd_shapes(columns: int, tokens: int, generator: torch.Generator) -> None:
    x = activations(tokens, columns, generator).bfloat16()
    before = torch.randn(columns, columns, generator=generator)
    total = before.clone()
    with native.use_isa("avx512_amx"):
        torch.ops.hfq.cpu_add_moment(total, x)
    expected = (before.double() + x.double().T @ x.double()).triu()
    torch.testing.assert_close(total.triu().double(), expected, rtol=2e-5, atol=1e-4)
    # Squares below the diagonal that share no tile with it stay as they were.
    far = torch.arange(columns) // 32
    below = far.unsqueeze(1) > far
    assert torch.equal(total[below], before[below])


@AMX
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, generator: torch.Generator) -> None:
    x = activations(40, 70, generator).bfloat16()
    x[33, 20] = bad
    moment = SecondMoment(70, torch.device("cpu"))
    moment.add(x, x)
    total = moment.mean(40)
    assert not total[20].isfinite().any() and not total[:, 20].isfinite().any()
    others = torch.arange(70) != 20
    assert total[others][:, others].isfinite().all()


@AMX
def test_operands_are_checked(generator: torch.Generator) -> None:
    x, total = activations(9, 20, generator).bfloat16(), torch.zeros(20, 20)
    add = torch.ops.hfq.cpu_add_moment
    for wrong_total, wrong_x, message in (
        (total, x.float(), "x must be bfloat16"),
        (total, x[0], r"x must be of shape \[T, K\]"),
        (total, x[:, ::2], "x must be contiguous"),
        (total[:19], x, r"total must be of shape \[20, 20\]"),
        (total.double(), x, "total must be float32"),
        (torch.zeros(20, 40)[:, ::2], x, "total must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            add(wrong_total, wrong_x)
    with (
        native.use_isa("avx512_vnni"),
        pytest.raises(RuntimeError, match="avx512_vnni has no matrix units"),
    ):
        add(total, x)
    assert not total.any()
