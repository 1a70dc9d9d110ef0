"""Packed modules that are moved, cast, copied, pickled and shared between processes: no packed tensor changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hfq.core.errors import KernelError
from hfq.core.spec import QuantSpec
from hfq.nn.linear import QuantLinear

from .packed_modules import COPIES, FOUR_BITS, equal, quantized, snapshot, tied

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "to tensor": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casts_reach_the_dtype_but_no_packed_tensor(
    cast: Callable[[nn.Module], nn.Module],
    prepared: bool,
    format_and_spec: tuple[str, QuantSpec],
    generator: torch.Generator,
) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec)
    before = snapshot(packed)
    if prepared:
        packed.prepare()
    dtype = cast(nn.Linear(1, 1)).weight.dtype
    assert cast(packed) is packed
    assert packed.compute_dtype == packed.weight.dtype == packed.bias.dtype == dtype
    assert packed.dequantize().dtype == dtype
    packed.float()
    after = snapshot(packed)
    assert torch.equal(before.pop("bias").to(dtype).float(), after.pop("bias"))
    assert equal(after, before)


def test_an_upcast_of_all_parameters_reaches_no_packed_tensor(generator: torch.Generator) -> None:
    """What `peft.prepare_model_for_kbit_training` does to a model."""
    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    for parameter in packed.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    assert torch.equal(packed(x), y) and equal(snapshot(packed), before)


def test_meta_and_back(format_and_spec: tuple[str, QuantSpec], generator: torch.Generator) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    packed.to("meta")
    assert all(p.is_meta for p in packed.parameters()) and packed.weight.is_meta
    packed.to_empty(device="cpu")
    packed.load_state_dict(before)
    assert torch.equal(packed(x), y) and equal(snapshot(packed), before)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_made_on_meta(assign: bool, cast: torch.dtype | None, generator: torch.Generator) -> None:
    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    with torch.device("meta"):
        skeleton = QuantLinear(32, 24, format="int", spec=FOUR_BITS)
    if cast:
        skeleton.to(cast)
    if not assign:
        skeleton.to_empty(device="cpu")
    skeleton.load_state_dict(before, assign=assign)
    skeleton.kernel_mode = "exact"
    skeleton.float()
    if cast and not assign:
        # The bias, which is no packed tensor, was copied into one of 16 bits and rounded.
        skeleton.bias.data.copy_(before["bias"])
    assert torch.equal(skeleton(x), y) and equal(snapshot(skeleton), before)


def test_share_memory(generator: torch.Generator) -> None:
    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y = packed(x)
    assert packed.share_memory() is packed
    assert all(p.is_shared() for p in packed.parameters())
    assert torch.equal(packed(x), y)
    packed.restore()
    packed.share_memory()
    assert torch.equal(packed(x), y)
    assert all(p.is_shared() for p in packed.parameters())


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_are_equal_neutral_and_independent(
    duplicate: Callable[[nn.Module], nn.Module],
    prepared: bool,
    format_and_spec: tuple[str, QuantSpec],
    generator: torch.Generator,
) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    if not prepared:
        packed.restore()
    twin = duplicate(packed)
    layout = packed.slot.layout()
    assert all(p.shape == layout[k].shape for k, p in twin.packed_parameters("weight").items())
    assert equal(snapshot(twin), before) and torch.equal(twin(x), y)
    twin.weight = torch.zeros(24, 32)
    assert equal(snapshot(packed), before) and torch.equal(packed(x), y)


def test_data_parallel_is_refused_in_words(generator: torch.Generator) -> None:
    for module in (quantized(generator), tied(generator)["table"]):
        with pytest.raises(KernelError, match=r"torchrun.*CUDA_VISIBLE_DEVICES"):
            module._replicate_for_data_parallel()
