"""Modules that read one input share a call, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.kernels import native
from hfq.nn import siblings
from hfq.nn.linear import QuantLinear

SPEC = IntSpec(group_size=32)
SIZES = {"q": 48, "k": 16, "v": 32}
COLUMNS = 64


class Block(nn.Module):
    """Modules that all read x, one after the other."""

    def __init__(
        self,
        generator: torch.Generator,
        format: str = "int",
        spec: QuantSpec = SPEC,
        bias: bool = False,
        sizes: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        for name, rows in (sizes or SIZES).items():
            linear = nn.Linear(COLUMNS, rows, bias=bias, dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.add_module(name, QuantLinear.from_linear(linear, format=format, spec=spec))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.children()], -1)


def group_of(module: nn.Module) -> siblings.Group | None:
    assert isinstance(module, QuantLinear)
    return module.operands("weight").siblings.group


def tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, count, COLUMNS, generator=generator).bfloat16()


def learnt(block: Block, generator: torch.Generator) -> Block:
    """After a second input it is known who saw the first."""
    for _ in range(2):
        block(tokens(1, generator))
    return block


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def alone(block: Block, x: Tensor) -> Tensor:
    """What the modules give one by one: each sees a copy of x, and their group is not asked."""
    outputs = []
    for module in block.children():
        assert isinstance(module, QuantLinear)
        operands = module.operands("weight")
        mode = module.int8_activations(x)
        outputs.append(operands.choice.row.linear(x, operands.grid, module.bias, mode))
    return torch.cat(outputs, -1)


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


def test_weights_are_in_one_memory_once(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    storages = {module.W_q.untyped_storage().data_ptr() for module in block.children()}
    assert len(storages) == 1
    grids = [module.grid("weight").qweight for module in block.children()]
    assert {grid.untyped_storage().data_ptr() for grid in grids} == storages
    assert block.q.W_q.untyped_storage().nbytes() == sum(SIZES.values()) * COLUMNS // 2


def test_an_input_that_changes_in_place_is_another_one(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    block.q(x)
    x.mul_(2)
    assert torch.equal(block.k(x), alone(block, x)[..., 48:64])


def test_a_hook_that_changes_the_input_is_heard(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    block.k.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    x = tokens(1, generator)
    wanted = torch.cat([block.q(x.clone()), block.k(x.clone()), block.v(x.clone())], -1)
    for _ in range(4):
        assert torch.equal(block(x.clone()), wanted)


def test_a_bias_that_somebody_writes_to_is_read_again(generator: torch.Generator) -> None:
    block = learnt(Block(generator, bias=True), generator)
    x = tokens(1, generator)
    before = block(x)
    block.k.bias.data.fill_(100.0)
    after = block(x.clone())
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


def test_nothing_is_kept_alive(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    block(x)
    references = [weakref.ref(x), weakref.ref(block.q), weakref.ref(block)]
    del x, block
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_copies_and_pickles_have_their_own_memory(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    wanted = block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    # What the class costs besides the codes, scales and names: no second copy of the weights.
    assert len(buffer.getvalue()) < 3 * sum(t.nbytes for t in block.state_dict().values()) + 20_000
    buffer.seek(0)
    for copied in (copy.deepcopy(block), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x.clone()), wanted)
        copied.q.requantize("weight", torch.zeros(48, COLUMNS))
        assert torch.equal(block(x.clone()), wanted)


def test_moving_and_casting_start_afresh(generator: torch.Generator) -> None:
    block = learnt(Block(generator), generator)
    x = tokens(1, generator)
    wanted = block(x)
    block.to(torch.float32)
    assert group_of(block.q) is None
    learnt(block, generator)
    assert group_of(block.q) is not None
    assert torch.equal(block(x), wanted)


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


def test_the_same_tensor_again_and_again_costs_no_memory(generator: torch.Generator) -> None:
    block, x = Block(generator), tokens(1, generator)
    for _ in range(100):
        block.q(x)
    assert len(siblings._LAST.modules) < 100
    assert group_of(learnt(block, generator).q) is not None


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


@pytest.fixture
def products(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Weights of the products that blocks compute, in their order."""
    row = Block(generator).q.operands("weight").choice.row
    linear, weights = type(row).linear, []

    def noted(self: object, x: Tensor, grid: object, *rest: object) -> Tensor:
        weights.append(grid)
        return linear(self, x, grid, *rest)

    monkeypatch.setattr(type(row), "linear", noted)
    return weights


def test_outputs_are_fetched_in_the_graph_that_computes_them(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, products: list[object]
) -> None:
    """Each module may be captured into a graph of its own, all with one input; and nobody may know which graph it is."""
    block, x = learnt(Block(generator), generator), tokens(1, generator)
    expected, group = alone(block, x), group_of(block.q)
    assert group is not None
    for work, count in (([(7, 1)] * 3, 1), ([(7, 2), (7, 3), (7, 3)], 2), ([None] * 3, 3)):
        left = iter(work)
        monkeypatch.setattr(siblings, "_work", lambda x, left=left: next(left))
        monkeypatch.setattr(siblings, "is_capturing", lambda x: True)
        products.clear()
        group.missed = 0
        outputs = [module(x) for module in block.children()]
        assert torch.equal(torch.cat(outputs, -1), expected)
        assert len(products) == count
        assert any(each is group.grid for each in products) == (work[0] is not None)
    assert group_of(block.q) is group


def test_outputs_are_fetched_in_the_stream_that_computes_them(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, products: list[object]
) -> None:
    block, x = learnt(Block(generator), generator), tokens(1, generator)
    expected, streams = alone(block, x), iter([1, 1, 2])
    monkeypatch.setattr(siblings, "_work", lambda x: (next(streams), 0))
    products.clear()
    outputs = [module(x) for module in block.children()]
    assert torch.equal(torch.cat(outputs, -1), expected)
    assert len(products) == 2


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


@pytest.mark.gpu
def test_siblings_share_a_call_in_a_graph(
    generator: torch.Generator, cuda: torch.device, products: list[object]
) -> None:
    block = Block(generator).to(cuda)
    for _ in range(3):
        block(tokens(1, generator).to(cuda))
    x, graph = tokens(1, generator).to(cuda), torch.cuda.CUDAGraph()
    products.clear()
    with torch.cuda.graph(graph):
        y = block(x)
    assert len(products) == 1
    x.copy_(tokens(1, generator))
    graph.replay()
    torch.testing.assert_close(y, alone(block, x), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_graphs_of_single_modules(generator: torch.Generator, cuda: torch.device) -> None:
    block = Block(generator).to(cuda)
    for _ in range(2):
        block(tokens(1, generator).to(cuda))
    x, graphs, outputs = tokens(1, generator).to(cuda), [], []
    for module in block.children():
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(module(x))
    x.copy_(tokens(1, generator))
    for graph in graphs:
        graph.replay()
    expected = alone(block, x)
    torch.testing.assert_close(torch.cat(outputs, -1), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_siblings_in_other_streams(generator: torch.Generator, cuda: torch.device) -> None:
    block, side = Block(generator).to(cuda), torch.cuda.Stream()
    for _ in range(4):
        x = tokens(1, generator).to(cuda)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = block(x)
        torch.cuda.current_stream().wait_stream(side)
        torch.testing.assert_close(found, alone(block, x), rtol=1e-2, atol=1e-2)
    assert group_of(block.q) is not None


@pytest.mark.gpu
def test_on_a_gpu(generator: torch.Generator, cuda: torch.device) -> None:
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")
    block = Block(generator).to(cuda)
    for _ in range(2):
        block(tokens(1, generator).to(cuda))
    assert group_of(block.q) is group_of(block.v) is not None
    for count in (1, 5, 32):
        x = tokens(count, generator).to(cuda)
        torch.testing.assert_close(block(x), alone(block, x), rtol=1e-2, atol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    for _ in range(3):
        x.copy_(tokens(32, generator))
        graph.replay()
        torch.testing.assert_close(y, alone(block, x), rtol=1e-2, atol=1e-2)
        block(x.clone())


def test_memory_that_other_processes_map_stays_where_it_is(generator: torch.Generator) -> None:
    block = Block(generator)
    for parameter in block.parameters():
        parameter.data.share_memory_()
    learnt(block, generator)
    assert group_of(block.q) is None


def test_threads(generator: torch.Generator) -> None:
    block = Block(generator)
    inputs = [tokens(1, generator) for _ in range(8)]
    wanted = [alone(block, x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(400):
                at = (first + i) % len(inputs)
                if not torch.equal(block(inputs[at].clone()), wanted[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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
