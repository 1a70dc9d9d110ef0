"""Modules that read one input share a call, and nobody can tell: who does, and that outputs are those of each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.kernels import native
from hfq.nn import siblings
from hfq.nn.linear import QuantLinear

from .sibling_modules import COLUMNS, SPEC, Block, alone, group_of, learnt, tokens

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels: nobody shares a call"),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("format", "spec"),
    [
        ("int", SPEC),
        ("int", IntSpec(bits=3, group_size=64, sym=False)),
        ("int", IntSpec(bits=8, group_size=-1)),
        ("nf4", CodebookSpec(group_size=32, double_quant=True)),
    ],
    ids=["int4", "int3 asymmetric", "int8", "nf4"],
)
def test_shared_outputs_are_those_of_each_module_alone(
    format: str, spec: QuantSpec, bias: bool, generator: torch.Generator
) -> None:
    block = Block(generator, format, spec, bias)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    learnt(block, generator)
    assert group_of(block.q) is not None
    assert group_of(block.q) is group_of(block.k) is group_of(block.v)
    for count in (1, 2, 5, 16, 32, 33):
        x = tokens(count, generator)
        y = block(x)
        assert torch.equal(y, alone(block, x)) and not y.isnan().any()
        assert all(module(x).is_contiguous() for module in block.children())
        assert group_of(block.q) is not None
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


def test_one_call_for_all(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    block = learnt(Block(generator), generator)
    row = block.q.operands("weight").choice.row
    calls = []
    linear = type(row).linear

    def counted(self: object, x: Tensor, grid: object, *rest: object) -> Tensor:
        calls.append(grid)
        return linear(self, x, grid, *rest)

    monkeypatch.setattr(type(row), "linear", counted)
    block(tokens(3, generator))
    assert len(calls) == 1


def test_an_input_that_changes_in_place_is_another_one(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    block.q(x)
    group = group_of(block.k)
    assert group is not None and group.waiting is not None and group.waiting.x is x
    x.mul_(2)
    assert torch.equal(block.k(x), alone(block, x)[..., 48:64])


def test_a_hook_that_changes_the_input_is_heard(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    wanted = alone(block, x)
    wanted[..., 48:64] = alone(block, x * 2)[..., 48:64]
    assert group_of(block.q) is group_of(block.k) is not None
    block.k.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    for _ in range(4):
        assert torch.equal(block(x.clone()), wanted)


def test_a_bias_that_somebody_writes_to_is_read_again(generator: torch.Generator) -> None:
    block = learnt(Block(generator, bias=True), generator)
    x = tokens(1, generator)
    before = block(x)
    block.k.bias.data.fill_(100.0)
    after = block(x.clone())
    assert group_of(block.q) is group_of(block.k) is not None
    assert torch.equal(after[..., :48], before[..., :48])
    assert torch.equal(after[..., 48:64], alone(block, x)[..., 48:64])
    assert not torch.equal(after[..., 48:64], before[..., 48:64])


def test_new_weights_are_used_at_once(generator: torch.Generator) -> None:
    block, other = learnt(Block(generator), generator), Block(generator)
    x = tokens(1, generator)
    wanted = alone(other, x)
    block.load_state_dict(other.state_dict())
    for _ in range(3):
        assert torch.equal(block(x.clone()), wanted)
    block.k.requantize("weight", torch.randn(16, COLUMNS, generator=generator).bfloat16())
    assert torch.equal(block(x), alone(block, x))
    assert group_of(block.q) is None
    learnt(block, generator)
    assert group_of(block.q) is group_of(block.k) is not None
    assert torch.equal(block(x.clone()), alone(block, x))


def test_another_kernel_mode_of_one_member_counts(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    assert group_of(block.q) is group_of(block.k) is not None
    block.k.kernel_mode = "exact"
    x = tokens(1, generator)
    for _ in range(3):
        assert torch.equal(block(x.clone()), alone(block, x))
    assert group_of(block.q) is None


def test_offloaded_weights_are_left_alone(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuantLinear, "is_offloaded", True)
    monkeypatch.setattr(siblings, "_notice", lambda module, x: pytest.fail("noticed"))
    Block(generator)(tokens(1, generator))


def test_outputs_that_nobody_fetches_end_the_sharing(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    for _ in range(3):
        block.q(tokens(1, generator))
    assert group_of(block.q) is None and group_of(block.k) is None
    x = tokens(1, generator)
    for _ in range(4):
        assert torch.equal(block(x.clone()), alone(block, x))
    assert group_of(block.q) is None


def test_only_equal_kernels_share(generator: torch.Generator) -> None:
    block = Block(generator)
    block.v = Block(generator, spec=IntSpec(bits=8, group_size=32)).v
    learnt(block, generator)
    assert group_of(block.q) is group_of(block.k) is not None and group_of(block.v) is None
    odd = learnt(Block(generator, sizes={"q": 17, "k": 16}), generator)
    assert group_of(odd.q) is None and group_of(odd.k) is None


@pytest.mark.parametrize("reason", ["gradients", "inference mode", "autocast", "many tokens"])
def test_where_it_does_not_apply(reason: str, generator: torch.Generator) -> None:
    contexts = {
        "gradients": torch.enable_grad(),
        "inference mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "many tokens": torch.no_grad(),
    }
    block = Block(generator)
    with contexts[reason]:
        for _ in range(3):
            block(tokens(33 if reason == "many tokens" else 1, generator))
    assert group_of(block.q) is None


def test_a_module_called_twice_belongs_to_no_group(generator: torch.Generator) -> None:
    block = Block(generator)
    for _ in range(3):
        x = tokens(1, generator)
        for module in (block.q, block.k, block.q):
            module(x)
    assert group_of(block.q) is None


def test_fake_tensors_leave_no_trace(generator: torch.Generator) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    block = Block(generator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(3):
            block(torch.empty(1, 1, COLUMNS, dtype=torch.bfloat16))
    assert group_of(block.q) is None
    learnt(block, generator)
    x = tokens(1, generator)
    assert torch.equal(block(x), alone(block, x))
