"""What stands between the products of a decode step, against float64 and against PyTorch: on every instruction set, and the CUDA
kernels in the emulator (cuda_on_cpu/cuda_on_cpu.h) and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hfq.kernels import decode, native

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
OPS = torch.ops.hfq

# Of a dtype, that values of size 1 are rounded to.
STEP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class _OnGpu:
    """Operators there, for tensors here."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            there = (a.cuda() if isinstance(a, Tensor) else a for a in arguments)
            y = getattr(OPS, name)(*there)
            return tuple(each.cpu() for each in y) if isinstance(y, tuple) else y.cpu()

        return call


@pytest.fixture(
    params=[*(native.load().isas or [None]), "emulated", pytest.param("gpu", marks=pytest.mark.gpu)]
)
def ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Whose operators: an instruction set's (PyTorch's where there are none), the emulated GPU's, a GPU's."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulator")
    elif request.param == "gpu":
        request.getfixturevalue("cuda")
        assert native.load().cuda, native.load().cuda_reason
        yield _OnGpu()
    elif request.param is None:
        yield OPS
    else:
        with native.use_isa(request.param):
            yield OPS


@pytest.fixture
def normal(generator: torch.Generator) -> Callable[..., Tensor]:
    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within two roundings of what float64 gives."""
    assert found.dtype == dtype and found.is_contiguous()
    scale = exact.abs().amax().clamp(min=1).item()
    torch.testing.assert_close(found.double(), exact, rtol=STEP[dtype], atol=STEP[dtype] * scale)


@DTYPES
@pytest.mark.parametrize("columns", [1, 15, 16, 255, 256, 2049])
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
def test_norm(
    ops: Any,
    columns: int,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
    normal: Callable[..., Tensor],
) -> None:
    x, weight = 30 * normal(3, 2, columns, dtype=dtype), normal(columns, dtype=dtype)
    found = ops.rms_norm(x, weight, 1e-5, offset, round_first)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_near(found, normed * (weight.double() + offset), dtype)
    reference = decode.rms_norm(x, weight, 1e-5, offset, round_first)
    if dtype != torch.float32:
        # Only where a sum in another order falls on the other side of a rounding.
        assert (found != reference).sum() <= 1 + found.numel() // 100
    assert ops.rms_norm(x[:0], weight, 1e-5, offset, round_first).shape == (0, 2, columns)


def test_norm_of_many_rows_and_of_nothing(ops: Any, normal: Callable[..., Tensor]) -> None:
    x, weight = normal(300, 700), normal(700)
    x[7] = 0
    found = ops.rms_norm(x, weight, 1e-6, 0.0, True)
    torch.testing.assert_close(found, decode.rms_norm(x, weight, 1e-6, 0.0, True))
    assert not found[7].any()


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(1, 1, 2), (5, 1, 48), (8, 2, 64), (3, 3, 130)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_rotation(
    ops: Any,
    heads: int,
    kv_heads: int,
    size: int,
    shared: bool,
    dtype: torch.dtype,
    normal: Callable[..., Tensor],
) -> None:
    batch = 3
    together = normal(batch, 1, (heads + 2 * kv_heads) * size, dtype=dtype)
    q, k, _ = together.split_with_sizes([n * size for n in (heads, kv_heads, kv_heads)], -1)
    angle = normal(1 if shared else batch, 1, size)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    found = ops.rotate(q, k, cos, sin)
    for ours, theirs in zip(found, decode.rotate(q, k, cos, sin), strict=True):
        assert ours.shape == theirs.shape and ours.is_contiguous()
        # Every product and sum is rounded where PyTorch does it.
        assert torch.equal(ours, theirs)


@DTYPES
@pytest.mark.parametrize("tanh_gelu", [True, False])
@pytest.mark.parametrize("columns", [1, 31, 256, 700])
def test_gate(
    ops: Any, columns: int, tanh_gelu: bool, dtype: torch.dtype, normal: Callable[..., Tensor]
) -> None:
    together = 6 * normal(2, 3, 2 * columns, dtype=dtype)
    gate, up = together.split_with_sizes([columns, columns], -1)
    found = ops.gate(gate, up, tanh_gelu)
    assert_near(found, decode.gate(gate.double(), up.double(), tanh_gelu), dtype)
    reference = decode.gate(gate, up, tanh_gelu)
    if dtype != torch.float32 and not tanh_gelu:  # PyTorch's gelu loses digits below 0
        assert (found != reference).sum() <= 1 + found.numel() // 100


def test_gate_far_from_zero(ops: Any) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 200.0, 1e30])
    one = torch.ones_like(gate)
    silu = ops.gate(gate, one, False)
    torch.testing.assert_close(silu, decode.gate(gate, one, False), rtol=1e-6, atol=1e-30)
    far = ops.gate(gate[1:-1], one[1:-1], True)
    torch.testing.assert_close(far, decode.gate(gate[1:-1], one[1:-1], True), rtol=1e-6, atol=1e-30)


def test_append(normal: Callable[..., Tensor]) -> None:
    for dtype in STEP:
        keys, values = normal(2, 3, 7, 5, dtype=dtype), normal(2, 3, 7, 5, dtype=dtype)
        expected = keys.clone(), values.clone()
        k, together = normal(2, 3, 1, 5, dtype=dtype), normal(2, 1, 40, dtype=dtype)
        v = together[..., 20:35]
        decode.append(*expected, k, v, 4)
        OPS.append(keys, values, k, v, 4)
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def masks(
    batch: int, heads: int, length: int, dtype: torch.dtype, normal: Callable[..., Tensor]
) -> Iterator[Tensor | None]:
    yield None
    for shape in ((batch, 1), (1, heads), (batch, heads), (1, 1)):
        seen = normal(*shape, 1, length) > -0.3
        seen[..., -1] = True
        yield seen
    yield normal(batch, heads, 1, length, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 2, 64), (6, 6, 80), (9, 1, 128), (7, 1, 16), (4, 2, 208)]
)
@pytest.mark.parametrize("length", [1, 15, 16, 65, 300])
def test_attention(
    ops: Any,
    heads: int,
    kv_heads: int,
    size: int,
    length: int,
    dtype: torch.dtype,
    normal: Callable[..., Tensor],
) -> None:
    if ops is not OPS and size * dtype.itemsize > 512:
        pytest.skip("too wide for the CUDA kernel")
    batch, room = 2, length + 3
    q = normal(batch, heads, 1, size, dtype=dtype)
    k, v = (normal(batch, kv_heads, room, size, dtype=dtype) for _ in range(2))
    # What lies behind is not looked at.
    k[:, :, length:] = v[:, :, length:] = torch.nan
    for mask in masks(batch, heads, length, dtype, normal):
        found = ops.attend(q, k, v, length, mask, 0.3)
        wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
        exact = decode.attend(q.double(), k.double(), v.double(), length, wide, 0.3)
        assert_near(found, exact, dtype)


def test_attention_to_nothing_is_zero(ops: Any, normal: Callable[..., Tensor]) -> None:
    q, k, v = normal(2, 4, 1, 32), normal(2, 2, 9, 32), normal(2, 2, 9, 32)
    unseen = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    unseen[1] = True
    for mask in (unseen, torch.where(unseen, 0.0, -torch.inf)):
        found = ops.attend(q, k, v, 9, mask, 0.2)
        assert not found[0].any() and found[1].abs().min() > 0
    assert not ops.attend(q, k, v, 0, None, 0.2).any()


def test_large_scores_do_not_overflow(ops: Any, normal: Callable[..., Tensor]) -> None:
    q, k, v = 300 * normal(1, 2, 1, 64), 300 * normal(1, 1, 50, 64), normal(1, 1, 50, 64)
    found = ops.attend(q, k, v, 50, None, 1.0)
    torch.testing.assert_close(found, decode.attend(q, k, v, 50, None, 1.0))
    # One is seen and all others too far away to count: its value exactly.
    far = torch.full((1, 1, 1, 50), -1e9)
    far[..., 17] = 0
    assert torch.equal(ops.attend(q, k, v, 50, far, 0.0), v[:, :, 17].repeat(1, 1, 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(
    ops: Any, bad: float, normal: Callable[..., Tensor]
) -> None:
    x = normal(2, 40)
    x[1, 33] = bad
    found = ops.rms_norm(x, torch.ones(40), 1e-5, 0.0, True)
    assert found[0].isfinite().all() and not found[1, 33].isfinite()
    gated = ops.gate(x, torch.ones(2, 40), False)
    assert not gated[1, 33].isfinite() and gated.isfinite().sum() == 79
    q, k, v = normal(1, 2, 1, 32), normal(1, 2, 20, 32), normal(1, 2, 20, 32)
    v[0, 1, 19, 5] = bad
    attended = ops.attend(q, k, v, 20, None, 0.2).view(2, 32)
    assert attended[0].isfinite().all() and not attended[1, 5].isfinite()
    q[0, 0, 0, 3] = torch.nan
    assert ops.attend(q, k, v, 20, None, 0.2).view(2, 32)[0].isnan().all()


@pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels")
def test_operands_are_checked(normal: Callable[..., Tensor]) -> None:
    x, one = normal(2, 1, 64), normal(1, 1, 32)
    q, k = normal(2, 4, 1, 32), normal(2, 2, 9, 32)
    short = torch.empty(0).set_(normal(60).untyped_storage(), 0, (2, 1, 30), (30, 30, 1))
    wrong: list[tuple[Any, tuple[Any, ...], str]] = [
        (OPS.rms_norm, (x, normal(63), 1e-5, 0.0, True), r"weight must be of shape \[64\]"),
        (OPS.rms_norm, (x, normal(64).half(), 1e-5, 0.0, True), "weight must be of the dtype of x"),
        (OPS.rms_norm, (x.double(), normal(64), 1e-5, 0.0, True), "x must be float32, float16"),
        (OPS.rms_norm, (x[..., ::2], normal(32), 1e-5, 0.0, True), "x must be contiguous"),
        (OPS.rms_norm, (torch.ones(()), normal(1), 1e-5, 0.0, True), r"x must be of shape \[..., K\]"),
        (OPS.rotate, (x, x, one[..., :31], one[..., :31]), "D must be even"),
        (OPS.rotate, (x, x, one, one[..., :30]), r"sin must be of shape \[1, 1, 32\]"),
        (OPS.rotate, (x, x, normal(3, 1, 32), normal(3, 1, 32)), r"cos must be of shape \[B or 1"),
        (OPS.rotate, (normal(2, 1, 65), x, one, one), r"q must be of shape \[B, 1, H \* D\]"),
        (OPS.rotate, (x, normal(2, 2, 64), one, one), r"k must be of shape \[B, 1, H \* D\]"),
        (OPS.rotate, (x, x[..., ::2], one, one), "k must be contiguous in its last dimension"),
        (OPS.rotate, (x, x.half(), one, one), "of the dtype of q and k"),
        (OPS.gate, (x, normal(2, 64), True), r"up must be of the shape of gate, \[2, 1, 64\]"),
        (OPS.gate, (x, x.half(), True), "up must be of the dtype of gate"),
        (OPS.gate, (x.long(), x.long(), True), "gate must be float32, float16"),
        (OPS.gate, (normal(4, 6).T, normal(6, 4), True), "gate must be contiguous in its last"),
        (OPS.gate, (short.expand(2, 1, 30)[:1].expand(3, 1, 30), normal(3, 1, 30), True), "rows at"),
        (OPS.append, (k, k.clone()[:1], k[:, :, :1], normal(2, 1, 64), 0), "values must be of shape"),
        (OPS.append, (k, k.clone(), k[:, :, :2], normal(2, 1, 64), 0), "k must be of shape"),
        (OPS.append, (k, k.clone(), normal(2, 2, 1, 32), normal(2, 1, 63), 0), "v must be of shape"),
        (OPS.append, (k, k.clone(), normal(2, 2, 1, 32), normal(2, 1, 64), 9), "from 0 to 8, got 9"),
        (OPS.append, (k, k.clone(), normal(2, 2, 1, 32), normal(2, 1, 64), -1), "from 0 to 8, got -1"),
        (OPS.append, (k[..., ::2], k, normal(2, 2, 1, 16), normal(2, 1, 32), 0), "keys must be cont"),
        (OPS.attend, (q, k, k, 10, None, 1.0), "length must be from 0 to 9, got 10"),
        (OPS.attend, (q, k, k[:, :1], 9, None, 1.0), r"v must be of shape \[2, 2, 9, 32\]"),
        (OPS.attend, (normal(2, 3, 1, 32), k, k, 9, None, 1.0), r"k must be of shape \[B, H', C, D\]"),
        (OPS.attend, (normal(2, 4, 2, 32), k, k, 9, None, 1.0), r"q must be of shape \[B, H, 1, D\]"),
        (OPS.attend, (q[..., :8].contiguous(), k, k, 9, None, 1.0), "D a multiple of 16"),
        (OPS.attend, (q, k.half(), k, 9, None, 1.0), "k must be of the dtype of q"),
        (OPS.attend, (q, k, k, 9, normal(2, 1, 1, 8), 1.0), r"mask must be of shape \[B or 1, H or 1"),
        (OPS.attend, (q, k, k, 9, normal(2, 1, 1, 9).half(), 1.0), "mask must be of the dtype of q"),
        (OPS.attend, (q, k.transpose(1, 2), k, 9, None, 1.0), "k must be of shape"),
    ]  # fmt: skip
    for op, arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_storage_is_checked(normal: Callable[..., Tensor]) -> None:
    """A view into memory that was taken away."""
    x = normal(4, 64)
    x.untyped_storage().resize_(2 * 64 * 4)
    with pytest.raises(RuntimeError, match="x must be backed by enough storage"):
        OPS.rms_norm(x, normal(64), 1e-5, 0.0, True)
    with pytest.raises(RuntimeError, match="gate must be backed by enough storage"):
        OPS.gate(x, normal(4, 64), False)


def test_operators_are_described(normal: Callable[..., Tensor]) -> None:
    x, angle = normal(2, 1, 64), normal(1, 1, 32)
    q, k = normal(2, 4, 1, 32), normal(2, 2, 9, 32)
    checks = ("test_schema", "test_faketensor")
    for op, arguments in (
        (OPS.rms_norm, (x, normal(64), 1e-5, 0.0, True)),
        (OPS.rotate, (x, normal(2, 1, 32), angle, angle)),
        (OPS.gate, (x, x.clone(), True)),
        (OPS.append, (k.clone(), k.clone(), normal(2, 2, 1, 32), x, 3)),
        (OPS.attend, (q, k, k.clone(), 7, None, 0.5)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)
