"""What tests of products on layout fragments assert alike, whatever the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
