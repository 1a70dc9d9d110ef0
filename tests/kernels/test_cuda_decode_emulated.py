"""The CUDA kernels of a decode step, run on the CPU, against hfq.kernels.decode. See cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.kernels import decode

HALVES = (torch.float16, torch.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)

# Of a dtype, that values of size 1 are rounded to.
STEP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def normal(generator: torch.Generator) -> Callable[..., Tensor]:
    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Within two roundings of what float64 gives."""
    step = STEP[found.dtype]
    scale = exact.abs().amax().clamp(min=1).item()
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=step * scale)


@DTYPES
@pytest.mark.parametrize("columns", [1, 15, 64, 255, 256, 1000, 4096, 20000])
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
def test_norm(
    emulator: Any,
    normal: Callable[..., Tensor],
    columns: int,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> None:
    x, weight = 30 * normal(3, columns, dtype=dtype), normal(columns, dtype=dtype)
    found = emulator.rms_norm(x, weight, 1e-5, offset, round_first)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_near(found, normed * (weight.double() + offset))
    if dtype != torch.float32:
        # Only where a sum in another order falls on the other side of a rounding.
        reference = decode.rms_norm(x, weight, 1e-5, offset, round_first)
        assert (found != reference).float().mean() < 0.01


def test_norm_where_rows_begin_anywhere_and_of_zeros(
    emulator: Any, normal: Callable[..., Tensor]
) -> None:
    memory, weight = normal(1 + 4 * 128, dtype=torch.bfloat16), normal(128, dtype=torch.bfloat16)
    x = memory[1:].view(4, 128)
    x[2] = 0
    found = emulator.rms_norm(x, weight, 1e-6, 0.0, True)
    torch.testing.assert_close(found, decode.rms_norm(x, weight, 1e-6, 0.0, True))
    assert not found[2].any()


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(1, 1, 2), (5, 1, 48), (8, 2, 64), (3, 3, 130)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_rotation(
    emulator: Any,
    normal: Callable[..., Tensor],
    heads: int,
    kv_heads: int,
    size: int,
    shared: bool,
    dtype: torch.dtype,
) -> None:
    batch = 3
    together = normal(batch, 1, (heads + 2 * kv_heads) * size, dtype=dtype)
    q, k, _ = together.split_with_sizes([n * size for n in (heads, kv_heads, kv_heads)], -1)
    angle = normal(1 if shared else batch, 1, size)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    found = emulator.rotate(q, k, cos, sin)
    for ours, theirs in zip(found, decode.rotate(q, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)


@DTYPES
@pytest.mark.parametrize("tanh_gelu", [True, False])
@pytest.mark.parametrize("columns", [1, 31, 256, 1304])
def test_gate(
    emulator: Any,
    normal: Callable[..., Tensor],
    columns: int,
    tanh_gelu: bool,
    dtype: torch.dtype,
) -> None:
    together = 6 * normal(5, 2 * columns, dtype=dtype)
    for gate, up in (
        together.split_with_sizes([columns, columns], -1),
        (together[:, :columns].contiguous(), together[:, columns:].contiguous()),
    ):
        found = emulator.gate(gate, up, tanh_gelu)
        assert_near(found, decode.gate(gate.double(), up.double(), tanh_gelu))
        if dtype != torch.float32 and not tanh_gelu:
            reference = decode.gate(gate, up, tanh_gelu)
            assert (found != reference).float().mean() < 0.01


def test_gate_far_from_zero(emulator: Any) -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 200.0, 1e30]])
    one = torch.ones_like(gate)
    found = emulator.gate(gate, one, False)
    torch.testing.assert_close(found, decode.gate(gate, one, False), rtol=1e-6, atol=1e-30)
    far = emulator.gate(gate[:, 1:-1].contiguous(), one[:, 1:-1].contiguous(), True)
    expected = decode.gate(gate[:, 1:-1], one[:, 1:-1], True)
    torch.testing.assert_close(far, expected, rtol=1e-6, atol=1e-30)


def masks(
    batch: int, heads: int, length: int, dtype: torch.dtype, normal: Callable[..., Tensor]
) -> Iterator[Tensor | None]:
    yield None
    for shape in ((batch, 1), (1, heads), (batch, heads), (1, 1)):
        seen = normal(*shape, 1, length) > -0.3
        seen[..., -1] = True
        yield seen
    yield normal(batch, heads, 1, length, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 2, 64), (6, 6, 80), (9, 1, 128), (7, 1, 16), (4, 2, 208)]
)
@pytest.mark.parametrize("length", [1, 15, 65, 300])
def test_attention(
    emulator: Any,
    normal: Callable[..., Tensor],
    heads: int,
    kv_heads: int,
    size: int,
    length: int,
    dtype: torch.dtype,
) -> None:
    """By one thread block for each head of keys, and by several."""
    batch, room, scale = 2, length + 3, 1 / math.sqrt(size)
    q = 2 * normal(batch, heads, 1, size, dtype=dtype)
    k, v = (2 * normal(batch, kv_heads, room, size, dtype=dtype) for _ in range(2))
    k[:, :, length:] = torch.nan  # nobody has written there
    v[:, :, length:] = torch.nan
    for number, mask in enumerate(masks(batch, heads, length, dtype, normal)):
        multiprocessors = (1, 100)[number % 2]
        found = emulator.attend(q, k, v, length, mask, scale, multiprocessors)
        wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
        exact = decode.attend(q.double(), k.double(), v.double(), length, wide, scale)
        assert_near(found, exact)


@pytest.mark.parametrize("multiprocessors", [1, 100])
def test_attention_to_nothing_and_what_is_hidden(
    emulator: Any, normal: Callable[..., Tensor], multiprocessors: int
) -> None:
    q = normal(2, 4, 1, 64, dtype=torch.bfloat16)
    k, v = (normal(2, 2, 200, 64, dtype=torch.bfloat16) for _ in range(2))
    assert not emulator.attend(q, k, v, 0, None, 0.1, multiprocessors).any()
    seen = torch.zeros(2, 1, 1, 200, dtype=torch.bool)
    seen[1, ..., :130] = True
    k[:, :, 130:], v[:, :, 130:] = torch.nan, torch.nan
    found = emulator.attend(q, k, v, 200, seen, 0.1, multiprocessors)
    assert not found[0].any()
    exact = decode.attend(q[1:].double(), k[1:].double(), v[1:].double(), 130, None, 0.1)
    assert_near(found[1:], exact)


def test_scores_far_from_zero(emulator: Any, normal: Callable[..., Tensor]) -> None:
    """Weights of exp(score) alone would overflow."""
    q = 60 * normal(1, 2, 1, 128, dtype=torch.bfloat16)
    k, v = (60 * normal(1, 2, 100, 128, dtype=torch.bfloat16) for _ in range(2))
    exact = decode.attend(q.double(), k.double(), v.double(), 100, None, 1.0)
    for multiprocessors in (1, 100):
        assert_near(emulator.attend(q, k, v, 100, None, 1.0, multiprocessors), exact)
