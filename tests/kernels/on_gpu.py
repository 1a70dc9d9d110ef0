"""What tests on a GPU share: CUDA graphs, products that overlap, and modules that go there and come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from hfq.core.spec import QuantSpec
from hfq.nn.linear import QuantLinear


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of `run`, and its output. `run` is called once before, when PyTorch loads kernels and allocates."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


def check_overlap(
    products: Sequence[Callable[[Tensor], Tensor]], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph, each product of what the one before gives, eight times over: as if they did not overlap."""

    def chain() -> Tensor:
        y = x
        for product in [*products] * 8:  # each output goes to memory that was just given back
            y = product(y)
        return y

    monkeypatch.setenv("HFQ_CUDA_OVERLAP", "0")
    expected = chain()
    assert expected.isfinite().all() and expected.count_nonzero()
    monkeypatch.setenv("HFQ_CUDA_OVERLAP", "1")
    graph, y = captured(chain)
    for _ in range(5):
        graph.replay()
        assert torch.equal(y, expected)


def quantized(
    columns: int, rows: int, format: str, spec: QuantSpec, generator: torch.Generator
) -> QuantLinear:
    """On the CPU, of random weights in bfloat16."""
    linear = nn.Linear(columns, rows, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return QuantLinear.from_linear(linear, format=format, spec=spec)


def check_module(
    packed: QuantLinear, row: str, cuda: torch.device, generator: torch.Generator
) -> None:
    """Few and many tokens, gradients, and the way to the CPU and back; `row`: the kernel's name."""
    saved = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.to(cuda)
    assert packed.kernel_choice("weight").row.name == row
    dense = packed.dequantize().double()
    assert packed.bias is not None
    for tokens in (1, 8, 40):
        x = torch.randn(tokens, packed.in_features, generator=generator)
        x = x.to(cuda, torch.bfloat16).requires_grad_()
        expected = x.detach().double() @ dense.T + packed.bias.double()
        torch.testing.assert_close(packed(x).double(), expected, rtol=1e-2, atol=2e-2)
        grad = torch.randn(tokens, packed.out_features, generator=generator)
        grad = grad.to(cuda, torch.bfloat16)
        packed(x).backward(grad)
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), grad.double() @ dense, rtol=1e-2, atol=2e-2)
    packed.to("cpu")
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
