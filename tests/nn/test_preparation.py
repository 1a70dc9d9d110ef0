"""Packed weights in a kernel's layout and back: exact, in one memory, from any thread and stream."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hfq.core.errors import KernelError
from hfq.core.spec import QuantSpec
from hfq.kernels import native
from hfq.nn import layout, parameters

from .packed_modules import equal, quantized, snapshot


def test_prepare_and_restore_are_exact(
    format_and_spec: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec, rows=37, columns=70)
    x = torch.randn(3, 70, generator=generator)
    before, weight = snapshot(packed), packed.dequantize()
    packed.restore()
    layout = packed.slot.layout()
    for key, parameter in packed.packed_parameters("weight").items():
        assert parameter.shape == layout[key].shape and not parameter.is_floating_point()
    y = packed(x)
    for _ in range(2):
        packed.prepare()
        assert equal(snapshot(packed), before) and torch.equal(packed.dequantize(), weight)
        assert torch.equal(packed(x), y)
    packed.restore()
    packed.restore()
    assert equal(snapshot(packed), before)


def test_one_copy_in_memory(generator: torch.Generator) -> None:
    """What a kernel reads are the Parameters themselves, in its layout."""
    packed = quantized(generator)
    packed.prepare()
    operands = packed.grid("weight")
    held = {p.untyped_storage().data_ptr() for p in packed.packed_parameters("weight").values()}
    for tensor in (operands.qweight, operands.scales):
        assert tensor.untyped_storage().data_ptr() in held


def test_threads_may_meet_in_the_first_forward(generator: torch.Generator) -> None:
    x = torch.randn(2, 32, generator=generator)
    reference = quantized(generator)
    wanted = reference(x)
    for _ in range(20):
        results = from_threads(copy.deepcopy(reference), x, 4)
        assert len(results) == 4 and all(torch.equal(y, wanted) for y in results)


def from_threads(module: nn.Module, x: Tensor, count: int) -> list[Tensor]:
    """Outputs of `count` threads that call the module at the same moment."""
    start, results = threading.Barrier(count), []

    def call() -> None:
        start.wait()
        results.append(module(x))

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_graph_is_no_place_to_prepare(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x = quantized(generator), torch.randn(2, 32, generator=generator)
    with monkeypatch.context() as capturing:
        capturing.setattr(parameters, "is_capturing", lambda weight: True)
        with pytest.raises(KernelError, match="run the model once before"):
            packed(x)
        packed.restore()
    wanted = packed(x)
    monkeypatch.setattr(parameters, "is_capturing", lambda weight: True)
    assert torch.equal(packed(x), wanted)


@pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels: layouts are the same")
def test_streams_are_waited_for_before_memory_is_given_away(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = quantized(generator)
    addresses: list[int] = []
    monkeypatch.setattr(
        parameters, "wait_for_streams", lambda weight: addresses.append(weight.data_ptr())
    )
    neutral = packed.W_q.data_ptr()
    packed.prepare()
    prepared = packed.W_q.data_ptr()
    packed.prepare()
    packed.restore()
    packed.restore()
    assert addresses == [neutral, prepared]


@pytest.mark.gpu
def test_prepared_in_one_stream_and_read_in_another(
    generator: torch.Generator, cuda: torch.device
) -> None:
    packed = quantized(generator, rows=4096, columns=4096).to(cuda)
    x = torch.randn(2, 4096, generator=generator).to(cuda, torch.bfloat16)
    wanted, side = packed(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(10):
        packed.restore()
        with torch.cuda.stream(side):
            found = packed(x)
        # What the neutral weight was in may be anybody's now.
        torch.full((4096 * 2048,), 255, dtype=torch.uint8, device=cuda)
        torch.cuda.synchronize()
        assert torch.equal(found, wanted)


def test_prepared_in_inference_mode_and_trained_later(generator: torch.Generator) -> None:
    packed = quantized(generator)
    x = torch.randn(3, 32, generator=generator)
    with torch.inference_mode():
        packed(x)
        packed.restore()
        packed(x)
        packed.weight = packed.dequantize()
        packed(x)
    x.requires_grad_(True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(3, 32))


def test_offloaded_weights_are_used_as_they_are_stored(generator: torch.Generator) -> None:
    class Hook:
        offload = True

    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y = packed(x)
    packed.restore()
    packed._hf_hook = Hook()
    layout = packed.slot.layout()
    torch.testing.assert_close(packed(x), y)
    assert all(p.shape == layout[k].shape for k, p in packed.packed_parameters("weight").items())
    assert packed.kernel("weight").name == "dequantize"
    assert all("offloaded" in reason for _, reason in packed.kernel_choice("weight").refused)


class _Operators(TorchDispatchMode):
    """Notes names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_kernel_lies_between_a_new_weight_and_the_first_product(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []
    monkeypatch.setattr(layout, "show_to_kernels", shown.append)
    quantized(generator).prepare()
    assert shown
    monkeypatch.undo()
    for device, kernels in (("cuda", 1), ("cpu", 0)):
        with FakeTensorMode(), _Operators() as operators:
            layout.show_to_kernels(torch.empty(4, device=device))
        assert operators.names.count("aten.new_ones.default") == kernels
