"""`hfq.doctor`: what is there, missing, broken."""

from __future__ import annotations

import json

import pytest
import torch

from hfq.core.errors import KernelError
from hfq.diagnose import Check, Diagnosis, doctor, installation, machine
from hfq.kernels import huge_pages, native


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


def test_machine():
    total, available = machine.memory() or (2, 1)
    assert total > available > 0
    assert machine.cpu_count() >= 1 and machine.cpu_name()
    assert machine.read_bandwidth(size=1 << 20) > 0


def test_bandwidth_is_optional(monkeypatch):
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 52e9)
    assert check(doctor(bandwidth=True), "read bandwidth").found == "52.0 GB/s"
    assert all(each.name != "read bandwidth" for each in doctor().checks)
