"""What others take from packed modules and put into them: state dicts, other Parameters, `functional_call`, optimizers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hfq.core.errors import CheckpointError
from hfq.core.spec import QuantSpec

from .packed_modules import equal, quantized, saved, snapshot


@pytest.mark.parametrize("prepared", [True, False])
def test_state_dicts_are_neutral_and_load_again(
    prepared: bool, format_and_spec: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    format, spec = format_and_spec
    packed, other = (quantized(generator, format=format, spec=spec) for _ in range(2))
    x = torch.randn(2, 32, generator=generator)
    y = packed(x)
    for module in (packed, other):
        module.prepare() if prepared else module.restore()
    state = packed.state_dict()
    layout = {packed.slot.attribute(key): entry for key, entry in packed.slot.layout().items()}
    assert state.keys() == {*layout, "bias"}
    for name, entry in layout.items():
        assert state[name].shape == entry.shape and state[name].dtype == entry.dtype
    state = torch.load(io.BytesIO(saved(state)))
    for assign in (True, False):
        twin = copy.deepcopy(other)
        if prepared:
            twin.prepare()
        twin.load_state_dict(state, assign=assign)
        assert torch.equal(twin(x), y) and equal(snapshot(twin), snapshot(packed))


def test_a_state_dict_is_a_snapshot_of_a_prepared_module(generator: torch.Generator) -> None:
    packed = quantized(generator)
    packed.prepare()
    state, before = packed.state_dict(), snapshot(packed)
    packed.weight = torch.zeros(24, 32)
    assert equal(dict(state), before)
    assert not equal(snapshot(packed), before)


def test_damaged_state_dicts_are_refused(generator: torch.Generator) -> None:
    packed = quantized(generator)
    before = snapshot(packed)
    damaged: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
        ("weight_scale", lambda t: t.float(), "torch.float16"),
        ("weight_scale", lambda t: t.bfloat16(), "torch.float16"),
        ("qweight", lambda t: t.int(), "torch.uint8"),
        ("qweight", lambda t: t[..., 0], "size mismatch"),
        ("weight_scale", lambda t: t.T, "size mismatch"),
    ]
    for name, change, message in damaged:
        with pytest.raises(RuntimeError, match=message):
            packed.load_state_dict({**before, name: change(before[name])})
        assert equal(snapshot(packed), before)
    with pytest.raises(RuntimeError, match="weight_scale"):
        packed.load_state_dict({k: v for k, v in before.items() if k != "weight_scale"})
    with pytest.raises(RuntimeError, match="Unexpected"):
        packed.load_state_dict({**before, "weight": packed.dequantize()})


def test_set_packed_checks_what_it_gets(generator: torch.Generator) -> None:
    packed = quantized(generator)
    tensors, before = packed.neutral_tensors("weight"), snapshot(packed)
    for bad in (
        {"weight": tensors["weight"]},
        {**tensors, "weight_scale": tensors["weight_scale"].float()},
        {**tensors, "weight": tensors["weight"][1:]},
    ):
        with pytest.raises(CheckpointError):
            packed.set_packed("weight", bad)
        assert equal(snapshot(packed), before)


def test_replaced_parameters_are_used(generator: torch.Generator) -> None:
    """Loaders and sharding put other Parameters in place, some of them behind the module's back."""
    packed, other = quantized(generator), quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    packed(x)
    wanted = other(x) - other.bias + packed.bias
    other.restore()
    for name in ("qweight", "weight_scale"):
        packed._parameters[name] = nn.Parameter(
            other._parameters[name].clone(), requires_grad=False
        )
    torch.testing.assert_close(packed(x), wanted)
    packed = quantized(generator)
    packed(x)
    for name, tensor in other.neutral_tensors("weight").items():
        setattr(
            packed, packed.slot.attribute(name), nn.Parameter(tensor.clone(), requires_grad=False)
        )
    torch.testing.assert_close(packed(x), other(x) - other.bias + packed.bias)
    assert not any(p.is_floating_point() for p in packed.packed_parameters("weight").values())


@pytest.mark.parametrize("prepared", [True, False])
def test_functional_call(prepared: bool, generator: torch.Generator) -> None:
    packed, other = quantized(generator), quantized(generator)
    x = torch.randn(2, 32, generator=generator, requires_grad=True)
    y = packed(x)
    if prepared:
        other.prepare()
    else:
        packed.restore()
    for state in (other.state_dict(), dict(other.named_parameters())):
        out = torch.func.functional_call(packed, state, (x,))
        torch.testing.assert_close(out, other(x))
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), x)[0], other.dequantize().sum(0).expand(2, 32)
        )
    assert torch.equal(packed(x), y)


def test_packed_tensors_do_not_train(generator: torch.Generator) -> None:
    model = nn.Sequential(quantized(generator), nn.Linear(24, 3))
    before = snapshot(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 32, generator=generator)).sum().backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    optimizer.step()
    assert equal(snapshot(model[0]), before)
    trainable = [p for p in model.parameters() if p.requires_grad]
    vector = nn.utils.parameters_to_vector(trainable)
    nn.utils.vector_to_parameters(vector * 2, trainable)
    assert torch.equal(nn.utils.parameters_to_vector(trainable), vector * 2)
    with pytest.raises(RuntimeError, match="floating point"):
        model[0].requires_grad_(True)
