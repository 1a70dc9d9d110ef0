"""`hfq.doctor`: what is there, missing, broken."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from hfq.core.errors import KernelError
from hfq.diagnose import Check, Diagnosis, doctor, installation, machine
from hfq.diagnose.selftest import LARGE, LARGE_BYTES, Verdict
from hfq.kernels import gpu_code, huge_pages, native


def check(diagnosis, name):
    return next(check for check in diagnosis.checks if check.name == name)


def test_this_machine_is_sound():
    diagnosis = doctor()
    assert diagnosis.ok, diagnosis.table()
    assert check(diagnosis, "torch").found == torch.__version__
    assert check(diagnosis, "self-test, cpu").status == "ok"
    assert {each.status for each in diagnosis.checks} <= {"ok", "missing"}


def test_tables_and_dicts():
    diagnosis = doctor()
    assert max(map(len, diagnosis.table().splitlines())) <= 100
    found = json.loads(json.dumps(diagnosis.to_dict()))
    assert found["ok"] is True and len(found["checks"]) == len(diagnosis.checks)


def test_only_what_is_broken_is_a_fault():
    fine = Check(name="a", status="missing", found="no", remedy="do this")
    assert Diagnosis(checks=(fine,)).ok
    broken = Diagnosis(checks=(fine, Check(name="b", status="broken", found="no")))
    assert not broken.ok
    assert broken.table().splitlines()[-1] == "a: do this"


@pytest.mark.parametrize(
    ("built", "status"),
    [({"cpu": {"built": True}}, "broken"), ({"cpu": {"built": False}}, "missing"), ({}, "missing")],
)
def test_native_kernels_that_are_not_loaded(monkeypatch, built, status):
    absent = native.NativeStatus(
        cpu=False, cuda=False, cpu_reason="no compiler was found", build=built
    )
    monkeypatch.setattr(native, "load", lambda: absent)
    found = check(doctor(), "CPU kernels")
    assert (found.status, found.found) == (status, "no compiler was found") and found.remedy


def test_a_wrong_instruction_set_is_named(monkeypatch):
    def load():
        raise KernelError("unknown instruction set 'mmx'")

    monkeypatch.setattr(native, "load", load)
    diagnosis = doctor()
    assert not diagnosis.ok
    assert "mmx" in check(diagnosis, "CPU kernels").found
    assert "HFQ_CPU_ISA" in check(diagnosis, "CPU kernels").remedy


def test_packages_that_are_missing_or_old(monkeypatch):
    versions = {"torch": "2.10.1", "transformers": "5.17.0.dev0", "safetensors": None, "peft": None}
    monkeypatch.setattr(installation, "_version", lambda name: versions.get(name, "9.9"))
    diagnosis = doctor()
    assert check(diagnosis, "torch").status == "broken"
    assert "2.11" in check(diagnosis, "torch").remedy
    assert check(diagnosis, "transformers").status == "ok"
    assert check(diagnosis, "safetensors").status == "broken"
    assert check(diagnosis, "peft").status == "missing"
    assert "pip install peft" in check(diagnosis, "peft").remedy


def test_huge_pages_that_are_off(monkeypatch):
    monkeypatch.setattr(huge_pages, "available", lambda: (False, "set to never"))
    found = check(doctor(), "huge pages")
    assert (found.status, found.found) == ("missing", "set to never")


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((8, 0), 1),
        ((8, 6), 1),
        ((8, 9), 1),
        ((8, 7), 0),
        ((9, 0), 1),
        ((9, 1), 0),
        ((10, 0), 0),
        ((7, 5), 0),
    ],
)
def test_machine_code_for_a_gpu(capability, code):
    archs = ["80-real", "89-real", "90a-real", "90-virtual"]
    assert gpu_code.has_code(archs, capability) == bool(code)
    assert gpu_code.has_code(["120"], (12, 0)) and not gpu_code.has_code(["120"], (10, 0))


def test_a_gpu_that_is_newer_than_the_build(monkeypatch):
    """Devices and library as on a machine with one; the self-test there is another test's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8 + 4 * index, 0))
    monkeypatch.setattr(installation, "self_test", lambda device, size: iter(()))
    status = native.NativeStatus(
        cpu=True, cuda=True, build={"cuda": {"built": True, "archs": ["80-real", "90-virtual"]}}
    )
    monkeypatch.setattr(native, "load", lambda: status)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 34))
    diagnosis = doctor()
    found = check(diagnosis, "CUDA kernels")
    assert found.status == "ok" and "sm_120 when" in found.remedy
    # Of both: what is built for one runs on no other.
    assert "'-DCMAKE_CUDA_ARCHITECTURES=80-real;120-real'" in found.remedy
    assert check(diagnosis, "CUDA device 1").status == "ok"
    assert {"self-test, cpu", "self-test, cuda:0", "self-test, cuda:1"} <= {
        each.name for each in diagnosis.checks
    }


def test_a_driver_that_pytorch_finds_too_old(monkeypatch):
    def old():
        warnings.warn(
            "CUDA initialization: The NVIDIA driver\non your system is too old", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old)
    found = check(doctor(), "CUDA")
    assert (
        found.status == "missing" and "driver on your system is too old; models run" in found.found
    )


def test_gpus_that_cannot_run_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 5 * index))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 34))
    monkeypatch.setattr(installation, "self_test", lambda device, size: iter(()))
    for archs, words in ((["80-real"], "GPUs of compute capability 9.0 do not run"), ([], "")):
        status = native.NativeStatus(
            cpu=True, cuda=True, build={"cuda": {"built": True, "archs": archs}}
        )
        monkeypatch.setattr(native, "load", lambda status=status: status)
        found = check(doctor(), "CUDA kernels")
        assert (found.status == "missing") == bool(words) and words in found.found
        assert not words or "CUDA_VISIBLE_DEVICES" in found.remedy
    assert found.found.startswith("loaded; ")


def test_cuda_kernels_that_are_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    reason = "HFQ_CUDA_KERNELS=off leaves them out"
    status = native.NativeStatus(
        cpu=True, cuda=False, cuda_reason=reason, build={"cuda": {"built": True}}
    )
    monkeypatch.setattr(native, "load", lambda: status)
    monkeypatch.setenv("HFQ_CUDA_KERNELS", "off")
    found = check(doctor(), "CUDA kernels")
    assert (found.status, found.found) == ("missing", reason) and "unset" in found.remedy


def test_machine():
    total, available = machine.memory() or (2, 1)
    assert total > available > 0
    assert machine.cpu_count() >= 1 and machine.cpu_name()
    assert machine.read_bandwidth(size=1 << 20) > 0


def test_bandwidth_is_optional(monkeypatch):
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 52e9)
    assert check(doctor(bandwidth=True), "read bandwidth").found == "52.0 GB/s"
    assert all(each.name != "read bandwidth" for each in doctor().checks)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0 with kernels and 16 GiB free; what the self-test finds there is `faults[large]`."""
    faults = {False: (), True: ()}

    def tested(device, size):
        wrong = faults[size == LARGE] if device.type == "cuda" else ()
        yield Verdict(weight="nf4", kernel="cuda_fragments", count=3, faults=wrong)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    monkeypatch.setattr(installation, "self_test", tested)
    loaded = native.NativeStatus(cpu=True, cuda=True)
    monkeypatch.setattr(native, "load", lambda: loaded)
    return faults


def self_tests(diagnosis):
    return {each.name: each for each in diagnosis.checks if each.name.startswith("self-test, cuda")}


def test_a_gpu_is_asked_for_large_weights_too(gpu):
    found = self_tests(doctor())
    assert {name: each.status for name, each in found.items()} == {
        "self-test, cuda:0": "ok",
        "self-test, cuda:0, large": "ok",
    }


def test_wrong_results_of_large_weights(gpu):
    gpu[True] = ("1 tokens of bfloat16: off by 1.0e+00 of the largest value",)
    found = self_tests(doctor())
    assert found["self-test, cuda:0"].status == "ok"
    assert found["self-test, cuda:0, large, nf4"].found.endswith(gpu[True][0])
    summary = found["self-test, cuda:0, large"]
    assert summary.status == "broken" and "HFQ_CUDA_WGMMA=0" in summary.remedy


def test_a_gpu_with_wrong_results_is_asked_no_more(gpu):
    gpu[False] = ("an illegal memory access was encountered",)
    assert list(self_tests(doctor())) == ["self-test, cuda:0, nf4", "self-test, cuda:0"]


def test_a_gpu_without_memory_for_large_weights(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (LARGE_BYTES - 1, 1 << 34))
    diagnosis = doctor()
    found = check(diagnosis, "self-test, cuda:0, large")
    assert found.status == "missing" and "2.1 GB" in found.found and diagnosis.ok
    assert "uses the GPU" in found.remedy


def test_a_gpu_without_our_kernels_has_none_for_large_weights(gpu, monkeypatch):
    absent = native.NativeStatus(cpu=True, cuda=False, cuda_reason="no compiler was found")
    monkeypatch.setattr(native, "load", lambda: absent)
    assert list(self_tests(doctor())) == ["self-test, cuda:0"]
