from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread_everywhere(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are tiny: threads would wait for each other longer than they work, in new processes as well."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
