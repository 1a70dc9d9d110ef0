from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulator import Emulator, SelfCheck, build, build_self_check

from hfq.kernels import native

# Numbers in a test's parameters from which its matrices are those of models.
_LARGE = 4096


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what would take a sanitizer of a GPU too long."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        if item.get_closest_marker("gpu") and parameters is not None:
            values = [
                v for p in parameters.params.values() for v in (p if type(p) is tuple else (p,))
            ]
            if any(type(value) is int and value >= _LARGE for value in values):
                item.add_marker("large")


@pytest.fixture(
    params=["avx512_amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "neon", "generic"]
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that there is code for; skips those that this machine does not run."""
    if request.param not in native.load().isas:
        pytest.skip(f"this machine does not run {request.param}")
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture(params=native.load().isas or [None])
def isa_or_reference(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set of this machine; PyTorch's code where there is no native one."""
    if request.param is None:
        yield
        return
    with native.use_isa(request.param):
        yield


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled for the CPU, once for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def emulator(emulator_folder: Path) -> Emulator:
    """The CUDA kernels on the CPU. Where HFQ_TEST_RACES is set, launches fail where nothing orders two accesses to memory."""
    return build(emulator_folder, races="HFQ_TEST_RACES" in os.environ)


@pytest.fixture(scope="session")
def self_check(emulator_folder: Path) -> SelfCheck:
    """Small kernels with mistakes."""
    return build_self_check(emulator_folder)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there are GPUs of these compute capabilities, with native kernels or without."""

    def pretend(*found: tuple[int, int], kernels: bool = True) -> None:
        status = native.NativeStatus(
            cpu=True, cuda=kernels, cuda_reason=None if kernels else "no nvcc"
        )
        monkeypatch.setattr(native, "load", lambda: status)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])

    return pretend
