"""The one memory that weights of modules with one input move to: what it costs, who has it, when they do not move."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch

from hfq.kernels import native
from hfq.nn import siblings

from .sibling_modules import COLUMNS, SIZES, Block, alone, group_of, learnt, tokens

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels: nobody shares a call"),
]


def test_weights_are_in_one_memory_once(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    storages = {module.W_q.untyped_storage().data_ptr() for module in block.children()}
    assert len(storages) == 1
    grids = [module.grid("weight").qweight for module in block.children()]
    assert {grid.untyped_storage().data_ptr() for grid in grids} == storages
    assert block.q.W_q.untyped_storage().nbytes() == sum(SIZES.values()) * COLUMNS // 2


@pytest.mark.parametrize("sharing", [False, True])
def test_nothing_is_kept_alive(sharing: bool, generator: torch.Generator) -> None:
    block = Block(generator)
    if sharing:
        learnt(block, generator)
    x = tokens(1, generator)
    block(x)
    group = group_of(block.q)
    assert (group is not None) == sharing
    references = [weakref.ref(each) for each in (x, block.q, block, group) if each is not None]
    del x, block, group
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_copies_and_pickles_have_their_own_memory(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    wanted = block(x)
    assert group_of(block.q) is group_of(block.k) is not None
    buffer = io.BytesIO()
    torch.save(block, buffer)
    # What the class costs besides the codes, scales and names: no second copy of the weights.
    assert len(buffer.getvalue()) < 3 * sum(t.nbytes for t in block.state_dict().values()) + 20_000
    buffer.seek(0)
    for copied in (copy.deepcopy(block), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x.clone()), wanted)
        copied.q.requantize("weight", torch.zeros(48, COLUMNS))
        assert torch.equal(block(x.clone()), wanted)
        learnt(copied, generator)
        assert group_of(copied.q) is group_of(copied.k) is not None
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(learnt(block, generator)(x.clone()), wanted)
        assert group_of(block.q) is group_of(block.k) is not None


def test_moving_and_casting_start_afresh(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    wanted = block(x)
    block.to(torch.float32)
    assert group_of(block.q) is None
    learnt(block, generator)
    assert group_of(block.q) is not None
    assert torch.equal(block(x), wanted)


def test_the_same_tensor_again_and_again_costs_no_memory(generator: torch.Generator) -> None:
    block, x = Block(generator), tokens(1, generator)
    for _ in range(100):
        block.q(x)
    assert len(siblings._LAST.modules) < 100
    assert group_of(learnt(block, generator).q) is not None


def test_without_room_for_a_copy_each_goes_alone(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, grids: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    block = Block(generator)
    monkeypatch.setattr(type(block.q.operands("weight").choice.row), "stack", full)
    for _ in range(4):
        x = tokens(1, generator)
        assert torch.equal(block(x), alone(block, x))
    assert group_of(block.q) is None


def test_memory_that_other_processes_map_stays_where_it_is(generator: torch.Generator) -> None:
    block = Block(generator)
    for parameter in block.parameters():
        parameter.data.share_memory_()
    learnt(block, generator)
    assert group_of(block.q) is None


def test_weights_in_a_cuda_graph_do_not_move(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def addresses(block: Block) -> list[int]:
        return [module.W_q.data_ptr() for module in block.children()]

    block, joined = Block(generator), learnt(Block(generator), generator)
    block(tokens(1, generator))  # noticed, but not joined yet
    before, before_joined = addresses(block), addresses(joined)
    with monkeypatch.context() as capturing:
        capturing.setattr(siblings, "is_capturing", lambda x: True)
        x = tokens(1, generator)
        for each in (block, joined):
            assert torch.equal(each(x.clone()), alone(each, x))
    for _ in range(4):
        block(tokens(1, generator))
    assert group_of(block.q) is None and addresses(block) == before
    assert group_of(joined.q) is not None and addresses(joined) == before_joined
