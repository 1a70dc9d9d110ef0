"""Modules that share a call in CUDA graphs, in several streams and in several threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.kernels import native
from hfq.nn import siblings

from .sibling_modules import Block, alone, group_of, learnt, tokens

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels: nobody shares a call"),
]


@pytest.fixture
def products(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Weights of the products that blocks compute, in their order."""
    return noted_products(Block(generator), monkeypatch)


def noted_products(block: Block, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    row = block.q.operands("weight").choice.row
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


@pytest.mark.gpu
def test_siblings_share_a_call_in_a_graph(
    generator: torch.Generator, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(generator).to(cuda)
    for _ in range(3):
        block(tokens(1, generator).to(cuda))
    x, graph = tokens(1, generator).to(cuda), torch.cuda.CUDAGraph()
    products = noted_products(block, monkeypatch)
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


@pytest.mark.parametrize("patience", [2, 10**9], ids=["as it is", "endless"])
def test_threads(
    patience: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    products: list[Any],
) -> None:
    """They learn together who shares, and take each other's place; with endless patience the group outlives that."""
    block = Block(generator)
    inputs = [tokens(1, generator) for _ in range(8)]
    wanted = [alone(block, x) for x in inputs]
    wrong: list[int] = []
    monkeypatch.setattr(siblings, "_PATIENCE", patience)

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
    largest = len(block.q.grid("weight").qweight)
    assert any(len(grid.qweight) > largest for grid in products)  # products of all
    assert patience == 2 or group_of(block.q) is group_of(block.k) is not None
