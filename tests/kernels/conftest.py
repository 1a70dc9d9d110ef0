from __future__ import annotations

from collections.abc import Iterator

import pytest

from hfq.kernels import native


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
