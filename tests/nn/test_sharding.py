"""Packed modules under FSDP2, in one process that has all parts: every format, and what is not possible says so.

tests/integrations/test_peft_training.py has two processes.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import hfq
from hfq.core.errors import KernelError
from hfq.core.spec import QuantSpec
from hfq.kernels import dispatch
from hfq.nn import parameters
from hfq.nn.layout import in_kernel_layout

from .packed_modules import equal, quantized, snapshot, tied

# Of modules by themselves; models share out whole layers.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view:UserWarning")


@pytest.fixture
def mesh(one_process: DeviceMesh) -> DeviceMesh:
    return one_process


def sharded(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """What is shared out goes again after a forward where it is not the outermost module."""
    return fully_shard(nn.Sequential(fully_shard(module, mesh=mesh)), mesh=mesh)


# Sums are in the order of another kernel where weights were sharded as they are stored.
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def gathered(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    return {name.removeprefix("0."): tensor.full_tensor() for name, tensor in state.items()}


@pytest.mark.parametrize("prepared", [True, False])
def test_every_format(
    mesh: DeviceMesh,
    prepared: bool,
    format_and_spec: tuple[str, QuantSpec],
    generator: torch.Generator,
) -> None:
    """Products, gradients and state dicts are those of the whole weight, which is read where it was gathered."""
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec, rows=33, columns=130)
    x = torch.randn(5, 130, generator=generator, requires_grad=True)
    wanted = packed(x)
    grad = torch.randn(wanted.shape, generator=generator)
    (wanted_grad,) = torch.autograd.grad(wanted, x, grad)
    before = snapshot(packed)
    packed.prepare() if prepared else packed.restore()
    model = sharded(packed, mesh)
    held = {name: (p.shape, p.dtype) for name, p in packed.named_parameters()}
    read = []
    for _ in range(2):
        y = model(x)
        close(y, wanted)
        close(torch.autograd.grad(y, x, grad)[0], wanted_grad)
        with torch.no_grad():
            close(model(x[:1]), wanted[:1])
        read.append(packed._prepared.get("weight"))
        assert {name: (p.shape, p.dtype) for name, p in packed.named_parameters()} == held
        assert all(isinstance(parameter, DTensor) for parameter in packed.parameters())
    # Unless it was sharded before it was in the kernel's layout.
    assert read[0] is read[1] and (read[0] is not None) == prepared
    if prepared:
        assert read[0].codes.untyped_storage().size() == 0
    assert equal(gathered(model), before)


class Ends(nn.Module):
    """An embedding and the output head that it shares its table with."""

    def __init__(self, ends: nn.ModuleDict) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ends["table"](index), self.ends["head"](x)


def test_tied_weights(mesh: DeviceMesh, generator: torch.Generator) -> None:
    model = Ends(tied(generator))
    index, x = torch.tensor([3, 39, 0]), torch.randn(2, 32, generator=generator)
    wanted, before = model(index, x), snapshot(model)
    fully_shard(model, mesh=mesh)
    read = []
    for _ in range(2):
        close(model(index, x), wanted)
        model.reshard()
        assert equal(gathered(model), before)
        read.append(model.ends["head"]._prepared["weight"])
    assert read[0] is read[1]


def test_packed_tensors_that_were_cast_are_refused(
    mesh: DeviceMesh, generator: torch.Generator
) -> None:
    packed = quantized(generator)
    x, wanted = torch.ones(1, 32), packed(torch.ones(1, 32))
    sharded(packed, mesh)
    codes = packed.qweight.full_tensor()
    with pytest.raises(KernelError, match="cast a packed weight"):
        packed.qweight = nn.Parameter(codes.bfloat16())
    packed.unshard()
    close(packed(x), wanted)


def test_casts_of_floats_do_not_reach_packed_tensors(
    mesh: DeviceMesh, generator: torch.Generator
) -> None:
    packed = quantized(generator)
    x = torch.randn(3, 32, generator=generator)
    wanted = packed(x.bfloat16().float())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(packed, mesh=mesh, mp_policy=policy)
    y = packed(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.02)
    packed.to(torch.float64)
    assert {name for name, p in packed.named_parameters() if p.dtype == torch.float64} == {"bias"}


def test_a_part_is_no_weight(mesh: DeviceMesh, generator: torch.Generator) -> None:
    packed = quantized(generator)
    wanted, state = packed.dequantize(), packed.state_dict()
    sharded(packed, mesh)
    with pytest.raises(KernelError, match="unshard"):
        packed.dequantize()
    packed.unshard()
    assert torch.equal(packed.dequantize(), wanted)
    for parts in (False, True):
        packed.reshard() if parts else None
        with pytest.raises(RuntimeError, match="before fully_shard"):
            packed.load_state_dict(state)
        with pytest.raises(KernelError, match="do it before"):
            packed.weight = torch.ones(24, 32)
        with pytest.raises(KernelError, match="do it before"):
            packed.requantize("weight", torch.ones(24, 32))
    packed.load_state_dict({"bias": packed.state_dict()["bias"] + 1}, strict=False)
    torch.testing.assert_close(packed.state_dict()["bias"].full_tensor(), state["bias"] + 1)


def test_weights_in_the_layout_of_another_device(
    mesh: DeviceMesh, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where `fully_shard` moves a model from the CPU to a GPU: what is cut then is in the CPU kernel's layout."""
    packed = quantized(generator)
    x = torch.ones(1, 32)
    packed(x)
    assert in_kernel_layout(packed.slot, packed.packed_parameters("weight"))
    model = sharded(packed, mesh)
    found = dispatch.select
    monkeypatch.setattr(
        dispatch, "select", lambda p: dispatch.Choice(dispatch.rows(p.kind)[-1], ())
    )
    with pytest.raises(KernelError, match="before, such as by"):
        model(x)
    monkeypatch.setattr(dispatch, "select", found)
    model(x)


@pytest.mark.usefixtures("no_grad")
def test_modules_that_saw_an_input_before_they_were_sharded(
    mesh: DeviceMesh, generator: torch.Generator
) -> None:
    """Another model's forward, which looks who else saw an input, leaves them alone."""
    first, second, other = (quantized(generator) for _ in range(3))
    x = torch.ones(1, 32)
    for module in (first, second):
        module(x)
    for module in (first, second):
        fully_shard(module, mesh=mesh)
    other(torch.ones(1, 32))


def test_all_or_none_gather_for_a_state_dict(
    mesh: DeviceMesh, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process still has of an earlier one does not matter: others wait for it."""
    packed = quantized(generator)
    packed(torch.ones(1, 32))
    sharded(packed, mesh)(torch.ones(1, 32))
    called = []
    whole = parameters.whole
    monkeypatch.setattr(parameters, "whole", lambda t: (called.append(1), whole(t))[1])
    counts = []
    kept = []
    for _ in range(2):
        called.clear()
        kept.append(packed.state_dict())
        counts.append(len(called))
    assert counts[0] == counts[1] > 0


def test_diagnosis_of_parts(mesh: DeviceMesh, generator: torch.Generator) -> None:
    packed = quantized(generator)
    before = hfq.explain(packed).weights[0].kernel
    sharded(packed, mesh)(torch.ones(1, 32))
    assert hfq.explain(packed).weights[0].kernel == before
