"""The blocks of a model, what each is called with, and running them one at a time.

A decoder hands its hidden states from block to block; everything else that blocks take (masks, rotary tables) is made
before the first one. So a model runs block by block, with the memory of one, once the arguments of each block are
known. They are taken from a forward in which blocks hand on their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError

__all__ = [
    "BlockCall",
    "find_blocks",
    "forward_after_blocks",
    "forward_block",
    "record_calls",
    "run_after_blocks",
    "run_block",
]


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: arguments by name.
        by_name: the hidden states are the keyword argument ``hidden_states``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool = False


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a decoder runs one after the other: full name -> module.

    They are the items of the `nn.ModuleList` with the most parameters, the outermost where lists are nested.

    Raises:
        CalibrationError: there is no such list.
    """
    found: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if len(module) and (found is None or size > found[0]):
            found = size, name, module
    if found is None:
        raise CalibrationError(
            f"{type(model).__name__} has no list of blocks to calibrate one by one; use a method that needs no data "
            "(rtn, hqq)"
        )
    return {f"{found[1]}.{index}": block for index, block in enumerate(found[2])}


class _Recorded(Exception):
    """All blocks have been called: what the model does after them is of no interest."""


@contextmanager
def _acting(
    blocks: Sequence[nn.Module], act: Callable[[int, Tensor, BlockCall], Tensor]
) -> Iterator[None]:
    """Within, `act` answers for the blocks: from a block's index, its hidden states and its other arguments."""

    def replacement(index: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if args:
                return act(index, args[0], BlockCall(args[1:], kwargs))
            return act(index, kwargs.pop("hidden_states"), BlockCall((), kwargs, by_name=True))

        return forward

    # On the instances: what models ask of their blocks (a type of attention) must stay readable, and hooks that move
    # tensors between devices live there, too.
    before = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        vars(block)["forward"] = replacement(index)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward


@torch.no_grad()
def record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Tensor
) -> tuple[Tensor, list[BlockCall]]:
    """The hidden states that enter the first block, and what each block is called with beside them.

    Args:
        batch: token ids int64 `[B, T]`.

    Raises:
        CalibrationError: the model did not call its blocks once each, in order.
    """
    calls: list[BlockCall] = []
    entered: list[Tensor] = []

    def record(index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        if index != len(calls):
            raise CalibrationError(
                f"expected block {len(calls)} to run next, but block {index} did: this model does not run its blocks "
                "one after the other and cannot be calibrated block by block; use a method that needs no data"
            )
        calls.append(call)
        entered.append(hidden)
        if len(calls) == len(blocks):
            raise _Recorded
        return hidden

    with _acting(blocks, record), suppress(_Recorded):
        model(input_ids=batch, use_cache=False)
    if len(calls) != len(blocks):
        raise CalibrationError(
            f"expected all of {len(blocks)} blocks to run, but {len(calls)} did: this model cannot be calibrated block "
            "by block; use a method that needs no data"
        )
    return entered[0], calls


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The hidden states `[B, T, H]` after a block."""
    return forward_block(block, hidden, call)


def forward_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """`run_block` that gradients may flow through."""
    if call.by_name:
        output = block(*call.args, hidden_states=hidden, **call.kwargs)
    else:
        output = block(hidden, *call.args, **call.kwargs)
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first


@torch.no_grad()
def run_after_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Tensor, hidden: Tensor
) -> Tensor:
    """The model's logits `[B, T, V]`, given what came out of the last of its blocks."""
    return forward_after_blocks(model, blocks, batch, hidden)


def forward_after_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Tensor, hidden: Tensor
) -> Tensor:
    """`run_after_blocks` that gradients may flow through."""
    with _acting(blocks, lambda index, _, call: hidden):
        logits = model(input_ids=batch, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits
