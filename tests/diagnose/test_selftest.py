"""The self-test of `hfq.doctor`: right kernels pass, each kind of fault is found and named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.diagnose import doctor, selftest
from hfq.diagnose.selftest import LARGE, SMALL, WEIGHTS, Size, Verdict, self_test
from hfq.kernels import native
from hfq.kernels.neutral import Neutral
from hfq.nn.packing import pack_weight

CPU = torch.device("cpu")


def of_weight(name: str) -> Verdict:
    return next(tested for tested in self_test(CPU) if tested.weight == name)


def change_linear(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """What the PyTorch reference of integers gives to 16-bit inputs; the self-test compares with float32 ones."""
    linear = Neutral.linear

    def changed(self: Neutral, x: Tensor, *arguments: Any) -> Tensor:
        y = linear(self, x, *arguments)
        return y if x.dtype == torch.float32 else change(y)

    monkeypatch.setattr(Neutral, "linear", changed)


@pytest.fixture
def without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfq.kernels import dispatch

    absent = native.NativeStatus(cpu=False, cuda=False, cpu_reason="no compiler was found")
    monkeypatch.setattr(native, "load", lambda: absent)
    dispatch.select.cache_clear()
    yield
    dispatch.select.cache_clear()


def test_kernels_of_this_machine_are_right() -> None:
    tested = list(self_test(CPU))
    assert len({each.weight for each in tested}) == len(tested) == len(WEIGHTS)
    assert not [each for each in tested if each.faults]
    assert {each.count for each in tested} == {25}
    if native.load().cpu:
        assert {"cpu_rows16", "cpu_int8", "cpu_fp8", "cpu_spqr"} <= {each.kernel for each in tested}


# As LARGE, in what takes no seconds here.
ALONE = Size(rows=272, columns=512, experts=None, tokens=(1, 9), on_cpu=False)


def test_a_weight_by_itself_packed_by_the_device() -> None:
    tested = list(self_test(CPU, size=ALONE))
    assert len(tested) == len(WEIGHTS)
    assert not [each for each in tested if each.faults]
    assert {each.count for each in tested} == {
        2 * 4 + 3
    }  # no experts, and nothing packed elsewhere


def test_a_packed_weight_by_itself() -> None:
    tested = list(self_test(CPU, WEIGHTS[2:3], replace(ALONE, on_cpu=True)))
    assert [(each.count, each.faults) for each in tested] == [(2 * 4 + 4, ())]


def test_large_weights_take_what_large_weights_take() -> None:
    assert LARGE.rows * LARGE.columns > 1 << 25
    assert LARGE.rows % 64 == 16  # a last block that is not whole
    assert LARGE.columns % 128 == 0  # float16 takes pairs of blocks with more than 64 tokens


@pytest.mark.gpu
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_kernels_of_a_gpu_are_right(cuda: torch.device, size: Size) -> None:
    tested = list(self_test(cuda, size=size))
    assert not [each for each in tested if each.faults]
    if native.load().cuda:
        assert {"cuda_fragments", "cuda_int8", "cuda_spqr"} <= {each.kernel for each in tested}


@pytest.mark.usefixtures("without_native_kernels")
def test_the_reference_is_right_in_16_bits() -> None:
    tested = list(self_test(CPU))
    assert not [each for each in tested if each.faults]
    assert {each.kernel for each in tested} == {"dequantize", "dequantize_fp8", "dequantize_spqr"}


@pytest.mark.usefixtures("without_native_kernels")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.3])
def test_one_wrong_number_is_a_fault(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def change(y: Tensor) -> Tensor:
        if len(y) != 50:
            return y
        y[49, 239] += value
        return y

    change_linear(monkeypatch, change)
    tested = of_weight("int 4 bits")
    assert [fault.split(":")[0] for fault in tested.faults] == [
        "50 tokens of bfloat16",
        "50 tokens of bfloat16 in int8",
        "50 tokens of float16",
        "50 tokens of float16 in int8",
    ]
    assert "of the largest value" in tested.faults[0]


@pytest.mark.usefixtures("without_native_kernels")
def test_a_wrong_shape_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    change_linear(monkeypatch, lambda y: y[:, :-1])
    faults = of_weight("nf4").faults
    assert faults[0] == "1 tokens of bfloat16: shape (1, 239), not (1, 240)"


@pytest.mark.parametrize("key", ["weight", "weight_scale"])
def test_a_weight_that_the_device_packs_wrongly_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The device's is the second of two; one group of one expert is enough."""
    calls = itertools.count()

    def pack(*arguments: Any) -> dict[str, Tensor]:
        packed = pack_weight(*arguments)
        if next(calls) % 2:
            packed[key][1, 5].view(torch.uint8)[:] = 0xFF  # scales: NaN
        return packed

    monkeypatch.setattr(selftest, "pack_weight", pack)
    (fault,) = of_weight("int 4 bits").faults
    assert fault.startswith("packed there: an error of ")


@pytest.mark.usefixtures("without_native_kernels")
def test_a_failure_is_told_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(y: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory\n  access was encountered")

    change_linear(monkeypatch, fail)
    tested = {each.weight: each for each in self_test(CPU)}
    assert tested["int 3 bits"].faults == ("an illegal memory access was encountered",)
    assert not tested["spqr 3 bits"].faults

    checks = {each.name: each for each in doctor().checks}
    assert checks["self-test, cpu, int 3 bits"].status == "broken"
    assert "illegal" in checks["self-test, cpu, int 3 bits"].found
    summary = checks["self-test, cpu"]
    assert summary.status == "broken" and "5 of 14" in summary.found
    assert "HFQ_CPU_ISA=generic" in summary.remedy
