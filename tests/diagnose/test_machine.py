"""How much memory a process may still take."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from hfq.diagnose import machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
CPU = torch.device("cpu")


def test_it_is_below_what_the_machine_has() -> None:
    known = machine.memory()
    assert known is not None
    total, available = known
    assert 0 < available <= total
    found = machine.available_memory(CPU)
    assert found is not None and 0 < found <= total
    assert machine.available_memory(torch.device("meta")) is None


@pytest.mark.parametrize("limited", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_limits_of_the_process_count(limited: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of 10 GB, of which something is in use; and one that is used up."""
    for limit, most in ((10**10, 10**10 - 10**7), (10**6, 0)):
        monkeypatch.setattr(
            resource,
            "getrlimit",
            lambda kind, limit=limit: (limit if kind == getattr(resource, limited) else -1, -1),
        )
        found = machine.available_memory(CPU)
        assert found is not None and found <= most
    assert resource.RLIM_INFINITY == -1


def test_a_container_s_use_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    known = machine.memory()
    monkeypatch.setattr(machine, "_container_limit", lambda: 3 << 20)
    monkeypatch.setattr(machine, "_container_use", lambda: 1 << 20)
    assert known is not None and machine.memory() == (3 << 20, 2 << 20)
