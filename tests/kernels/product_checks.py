"""What tests of products on layout fragments assert alike, whatever the kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from fragments_weights import HALVES, random_weight
from torch import Tensor


def check_tokens_are_apart(
    product: Callable[[Tensor], Tensor],
    weight: Any,
    x: Tensor,
    generator: torch.Generator,
    rounded: bool = False,
) -> None:
    """Products are right, and a token's depends on no other's: neither on those that exist nor on memory where none is."""
    y = product(x)
    weight.check(y, x, rounded=rounded)
    order = torch.randperm(len(x), generator=generator)
    assert torch.equal(product(x[order]), y[order])


def check_only_bad(y: Tensor, bad: int) -> None:
    """No number of row `bad` is finite, and all others are."""
    finite = y.isfinite()
    assert not finite[bad].any()
    assert finite[torch.arange(len(y)) != bad].all()


def check_dtypes(
    product: Callable[[Tensor, Any, Tensor | None], Tensor],
    tokens: int,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    generator: torch.Generator,
) -> None:
    """Products of activations, a weight and a bias of these dtypes are right."""
    for kind, dtype in itertools.product(((4, "zeros"), (8, None)), HALVES):
        w = random_weight(generator, (20, 104, 32), kind, scale_dtype=scale_dtype)
        x = torch.randn(tokens, 104, generator=generator).to(dtype)
        bias = None if bias_dtype is None else torch.randn(20, generator=generator).to(bias_dtype)
        w.check(product(x, w, bias), x, bias)


def check_bad_passes_through_partial_sums(
    product: Callable[[Tensor, Any], Tensor], tokens: int, bad: float, generator: torch.Generator
) -> None:
    """What is no number reaches its token's outputs, whichever range has its column: the one that adds up, or others."""
    w = random_weight(generator, (280, 1544, 64), (4, "zeros"))
    for column in (0, 700, 1543):
        x = torch.randn(tokens, 1544, generator=generator).half()
        x[tokens - 9, column] = bad
        check_only_bad(product(x, w), tokens - 9)


def check_activations_of_size(
    product: Callable[[Tensor], Tensor],
    weight: Any,
    power: int,
    generator: torch.Generator,
    digits: bool = False,
) -> None:
    """Products of one token, some 2^power with zeros and a larger one in it, are right, or near where outputs are as extreme."""
    for dtype in HALVES:
        x = (torch.randn(1, 520, generator=generator).double() * 2.0**power).to(dtype)
        x[0, 128:256] = 0
        x[0, 300] *= 64
        if x.isfinite().all():
            y = product(x)
            if abs(power) < 15:
                weight.check(y, x, digits=digits)
            elif dtype == torch.bfloat16:
                expected = x.double() @ (weight.values * weight.scales).T
                assert (y.double() - expected).abs().max() < 0.01 * expected.abs().max()
