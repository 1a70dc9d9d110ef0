"""The native CPU kernels against a float64 reference, on every instruction set that this machine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hfq.core import bits as bit_packing
from hfq.core.float8 import e4m3_table
from hfq.kernels import native, ops, rows16

assert ops.LIBRARY is not None  # defines torch.ops.hfq

KINDS = (
    *("int2", "int2_zeros", "int3", "int3_zeros"),
    *("int4", "int4_zeros", "table4", "int8", "int8_zeros", "float8"),
)
# With activations as they are, or rounded to int8, which 8-bit floats do not meet.
PRODUCTS = tuple(
    (kind, int8) for kind in KINDS for int8 in (False, True) if not (int8 and kind == "float8")
)
# Columns that begin with a new 32-bit word: group sizes are multiples of them.
UNITS = {2: 16, 3: 32, 4: 8, 8: 4}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the output dtype, relative to the largest output.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# (N, K, group_size): blocks that are not full, last groups that are shorter, odd numbers of columns.
SHAPES = (
    (1, 8, 8),
    (15, 24, 8),
    (17, 130, 64),
    (33, 72, 72),
    (16, 256, 32),
    (33, 130, 130),
    (48, 520, 128),
    (5, 7, 7),
    (31, 100, 40),
    (40, 700, 192),
    (33, 1100, 384),
    (20, 96, 48),
)


@dataclass(frozen=True)
class Weight:
    """A random weight: `arguments` in layout rows16 for the operators, `dense` `[N, K]` in float64."""

    arguments: tuple[Tensor | None, ...]
    sizes: tuple[int, int, int, int]
    dense: Tensor

    def linear(self, x: Tensor, bias: Tensor | None = None, int8: bool = False) -> Tensor:
        y: Tensor = torch.ops.hfq.cpu_linear(x, *self.arguments, bias, *self.sizes, int8)
        return y

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = torch.ops.hfq.cpu_dequantize(*self.arguments, *self.sizes, dtype)
        return weight


MakeWeight = Callable[..., Weight]


@pytest.fixture(autouse=True)
def _native() -> None:
    status = native.load()
    if not status.cpu:
        pytest.skip(f"no native CPU kernels: {status.cpu_reason}")


@pytest.fixture
def make_weight(generator: torch.Generator) -> MakeWeight:
    def make(
        rows: int,
        columns: int,
        group_size: int,
        kind: str = "int4",
        scale_dtype: torch.dtype = torch.float32,
    ) -> Weight:
        bits = int(kind.removesuffix("_zeros")[-1])
        if kind == "float8":
            group_size = columns  # the one that there is
        if group_size < columns and group_size % UNITS[bits]:
            pytest.skip(f"{bits} bits take groups in multiples of {UNITS[bits]}")
        groups = -(-columns // group_size)
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
        codes[0, 0], codes[-1, -1] = 0, (1 << bits) - 1
        if kind == "float8":
            codes[codes & 127 == 127] -= 1  # NaN
        scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3).to(scale_dtype)
        zeros = codebook = None
        if kind.endswith("zeros"):
            zeros = (torch.rand(rows, groups, generator=generator) * ((1 << bits) - 1)).to(
                scale_dtype
            )
        if kind == "table4":
            codebook = torch.rand(16, generator=generator) * 2 - 1
        if kind == "float8":
            codebook = e4m3_table()
        by_column = torch.arange(columns) // group_size
        if codebook is not None:
            values = codebook.double()[codes.long()]
        elif zeros is None:
            values = codes.double() - (1 << (bits - 1))
        else:
            values = codes.double() - zeros.double()[:, by_column]
        packed = bit_packing.pack(codes, bits).unsqueeze(-1)
        arguments = (
            rows16.to_rows16(packed, split=bits == 3),
            rows16.to_rows16(scales),
            None if zeros is None else rows16.to_rows16(zeros),
            codebook,
        )
        dense = values * scales.double()[:, by_column]
        return Weight(arguments, (bits, group_size, columns, rows), dense)

    return make


def _error(y: Tensor, expected: Tensor) -> float:
    """Largest difference, in parts of the largest expected value."""
    return ((y.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def _int8_product(x: Tensor, weight: Weight) -> Tensor:
    """The product of what int8 activations stand for: float64 `[M, N]`.

    Activations have a scale for each token and block of at most 128 columns, which starts afresh in every group; the
    entries of a codebook are rounded to 1/127 of the largest.
    """
    _, group_size, columns, _ = weight.sizes
    rounded = torch.zeros(x.shape, dtype=torch.float64)
    for begin in range(0, columns, group_size):
        end = min(begin + group_size, columns)
        for first in range(begin, end, 128):
            part = x[:, first : min(first + 128, end)].float()
            largest = part.abs().amax(1, keepdim=True)
            codes = (part * (torch.full_like(largest, 127) / largest)).round()
            rounded[:, first : first + part.shape[1]] = codes.double() * largest.double() / 127
    return rounded @ _with_rounded_codebook(weight).T


def _with_rounded_codebook(weight: Weight) -> Tensor:
    codebook = weight.arguments[3]
    if codebook is None:
        return weight.dense
    largest = codebook.abs().max()
    near = (codebook * 127 / largest).round().double() * largest.double() / 127
    # What a value of the weight was before its scale: the entry that is nearest.
    _, group_size, columns, rows = weight.sizes
    scales = rows16.from_rows16(weight.arguments[1], (rows, -(-columns // group_size))).double()  # type: ignore[arg-type]
    scales = scales[:, torch.arange(columns) // group_size]
    entry = (weight.dense / scales).unsqueeze(-1).sub(codebook.double()).abs().argmin(-1)
    return near[entry] * scales


def _is_int8_product(y: Tensor, x: Tensor, weight: Weight, offset: Tensor | float = 0.0) -> bool:
    expected = _int8_product(x, weight) + offset
    # Where a zero point is taken off, the sums are larger than their difference.
    largest = (x.double().abs() @ weight.dense.abs().T).max() + expected.abs().max()
    error = (y.double() - expected).abs().max()
    return bool(error <= 2e-6 * largest + TOLERANCE[y.dtype] * expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(
    isa: str,
    make_weight: MakeWeight,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    weight = make_weight(*shape, kind=kind)
    for tokens in (1, 2, 5, 17, 40):
        x = torch.randn(tokens, shape[1], generator=generator)
        expected = x.double() @ weight.dense.T
        assert _error(weight.linear(x), expected) < TOLERANCE[torch.float32]
        if (kind, True) in PRODUCTS:
            assert _is_int8_product(weight.linear(x, int8=True), x, weight)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 64, 65, 130])
@pytest.mark.parametrize(
    ("kind", "int8"), [("int4_zeros", False), ("int4_zeros", True), ("float8", False)]
)
def test_every_number_of_tokens(
    isa: str,
    make_weight: MakeWeight,
    generator: torch.Generator,
    tokens: int,
    kind: str,
    int8: bool,
) -> None:
    weight = make_weight(33, 136, 64, kind=kind)
    x = torch.randn(tokens, 136, generator=generator)
    y = weight.linear(x, int8=int8)
    assert y.shape == (tokens, 33)
    if int8:
        assert not tokens or _is_int8_product(y, x, weight)
    else:
        assert not tokens or _error(y, x.double() @ weight.dense.T) < TOLERANCE[torch.float32]
    for token in range(tokens):
        # A token's result does not depend on its neighbours, up to the order of summation.
        alone = weight.linear(x[token : token + 1], int8=int8)
        torch.testing.assert_close(y[token : token + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_dtypes(
    isa: str,
    make_weight: MakeWeight,
    generator: torch.Generator,
    x_dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> None:
    for kind in KINDS:
        weight = make_weight(35, 200, 64, kind=kind, scale_dtype=scale_dtype)
        for tokens, bias_dtype in zip((1, 3, 20), FLOATS, strict=True):
            x = torch.randn(tokens, 200, generator=generator).to(x_dtype)
            bias = torch.randn(35, generator=generator).to(bias_dtype)
            expected = x.double() @ weight.dense.T + bias.double()
            y = weight.linear(x, bias)
            assert y.dtype == x_dtype
            assert _error(y, expected) < TOLERANCE[x_dtype]
            if (kind, True) in PRODUCTS:
                y = weight.linear(x, bias, int8=True)
                assert _is_int8_product(y, x, weight, bias.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize(
    isa: str, make_weight: MakeWeight, shape: tuple[int, int, int], kind: str
) -> None:
    for scale_dtype in FLOATS:
        weight = make_weight(*shape, kind=kind, scale_dtype=scale_dtype)
        for dtype in FLOATS:
            dense = weight.dequantize(dtype)
            assert dense.shape == shape[:2]
            assert dense.dtype == dtype
            # The value is computed in float32 and rounded once.
            torch.testing.assert_close(
                dense,
                weight.dense.float().to(dtype),
                rtol=1e-2 if dtype == torch.bfloat16 else 2e-3,
                atol=1e-6,
            )


def test_dequantize_agrees_with_the_reference_bit_for_bit(
    isa: str, make_weight: MakeWeight
) -> None:
    weight = make_weight(50, 256, 64, scale_dtype=torch.float16)
    qweight, scales, _, _ = weight.arguments
    assert qweight is not None
    assert scales is not None
    neutral = (
        rows16.from_rows16(qweight, (50, 128, 1)),
        rows16.from_rows16(scales, (50, scales.shape[-2])),
    )
    for dtype in FLOATS:
        expected = torch.ops.hfq.dequantize(*neutral, None, None, None, 4, 64, 256, dtype)
        assert torch.equal(weight.dequantize(dtype), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lookup_gives_rows_of_the_dequantized_weight(
    isa: str,
    make_weight: MakeWeight,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    for scale_dtype in FLOATS:
        weight = make_weight(*shape, kind=kind, scale_dtype=scale_dtype)
        for dtype, count in zip(FLOATS, (0, 1, 35), strict=True):
            index = torch.randint(shape[0], (count,), generator=generator)
            rows = torch.ops.hfq.cpu_lookup(index, *weight.arguments, *weight.sizes, dtype)
            assert torch.equal(rows, weight.dequantize(dtype)[index]) and not rows.isnan().any()


@pytest.mark.parametrize(("kind", "int8"), PRODUCTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_reaches_the_output(
    isa: str, make_weight: MakeWeight, generator: torch.Generator, kind: str, int8: bool, bad: float
) -> None:
    weight = make_weight(20, 136, 64, kind=kind)
    for dtype in FLOATS:
        for tokens in (9, 18):
            x = torch.randn(tokens, 136, generator=generator).to(dtype)
            x[4, 133] = bad
            finite = weight.linear(x, int8=int8).isfinite()
            assert not finite[4].any()
            assert finite[torch.arange(tokens) != 4].all()


def test_extreme_activations(isa: str, make_weight: MakeWeight) -> None:
    weight = make_weight(16, 64, 32, kind="int8")
    for int8 in (False, True):
        assert torch.equal(weight.linear(torch.zeros(2, 64), int8=int8), torch.zeros(2, 16))
    tiny = torch.full((1, 64), 1e-40)  # subnormal: the reciprocal of its scale would overflow
    assert weight.linear(tiny, int8=True).isfinite().all()
    large = torch.full((1, 64), 1e30)
    assert _is_int8_product(weight.linear(large, int8=True), large, weight)


@pytest.mark.parametrize("code", [0, 127, 128, 255])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_8_bit_codes_do_not_saturate(isa: str, code: int, sign: float) -> None:
    """Two products of 255 * 127 exceed the 16 bits of AVX2's vpmaddubsw."""
    codes = torch.full((16, 128), code, dtype=torch.uint8).unsqueeze(-1)
    scales = torch.ones(16, 1)
    x = torch.full((1, 128), sign)
    y = torch.ops.hfq.cpu_linear(
        x,
        rows16.to_rows16(codes),
        rows16.to_rows16(scales),
        None,
        None,
        None,
        8,
        128,
        128,
        16,
        True,
    )
    torch.testing.assert_close(y, torch.full((1, 16), sign * (code - 128) * 128.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("tokens", [1, 8])
def test_4_bit_codes_do_not_saturate(isa: str, sign: float, tokens: int) -> None:
    codes = torch.full((16, 128), 15, dtype=torch.uint8)
    packed = bit_packing.pack(codes, 4).unsqueeze(-1)
    x = torch.full((tokens, 256), sign)
    scales = torch.ones(16, 1)
    zeros = torch.zeros(16, 1)
    x = x[:, :128].contiguous()
    y = torch.ops.hfq.cpu_linear(
        x,
        rows16.to_rows16(packed),
        rows16.to_rows16(scales),
        rows16.to_rows16(zeros),
        None,
        None,
        4,
        128,
        128,
        16,
        True,
    )
    torch.testing.assert_close(y, torch.full((tokens, 16), sign * 15 * 128.0))


def test_threads_give_the_same_result(make_weight: MakeWeight, generator: torch.Generator) -> None:
    weight = make_weight(1000, 1024, 128)
    x = torch.randn(20, 1024, generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = (
            [weight.linear(x, int8=int8) for int8 in (False, True)],
            weight.dequantize(torch.bfloat16),
        )
        torch.set_num_threads(2)
        two = (
            [weight.linear(x, int8=int8) for int8 in (False, True)],
            weight.dequantize(torch.bfloat16),
        )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize(
    ("kind", "int8"),
    [each for each in PRODUCTS if each[0] in ("int4", "int3_zeros", "table4", "int8", "float8")],
)
def test_stacks_of_experts(
    isa: str, make_weight: MakeWeight, generator: torch.Generator, kind: str, int8: bool
) -> None:
    experts = [make_weight(35, 200, 64, kind=kind) for _ in range(5)]
    stacks: list[Tensor | None] = []
    for tensors in zip(*(one.arguments for one in experts), strict=True):
        present = [tensor for tensor in tensors if tensor is not None]
        stacks.append(torch.stack(present) if present else None)
    if kind in ("table4", "float8"):
        # One codebook for all.
        table = experts[0].arguments[3]
        experts = [Weight((*one.arguments[:3], table), one.sizes, one.dense) for one in experts]
        stacks[3] = table
    bias = torch.randn(5, 35, generator=generator)
    for counts in ([3, 0, 1, 40, 2], [0, 0, 0, 0, 1], [70, 0, 0, 0, 0], [0] * 5):
        x = torch.randn(sum(counts), 200, generator=generator).bfloat16()
        for each_bias in (None, bias):
            y = torch.ops.hfq.cpu_experts_linear(
                x, torch.tensor(counts), *stacks, each_bias, *experts[0].sizes, int8
            )
            parts = [
                one.linear(part, None if each_bias is None else each_bias[i], int8=int8)
                for i, (one, part) in enumerate(zip(experts, x.split(counts), strict=True))
            ]
            assert torch.equal(y, torch.cat(parts))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([3, 0]), "must be at least 0 and add up to M"),
        (torch.tensor([3, 2]), "must be at least 0 and add up to M"),
        (torch.tensor([5, -1]), "must be at least 0 and add up to M"),
        (torch.tensor([4]), r"counts must be of shape \[2\]"),
        (torch.tensor([4, 0], dtype=torch.int32), "counts must be int64"),
    ],
    ids=str,
)
def test_wrong_counts_are_refused(make_weight: MakeWeight, counts: Tensor, message: str) -> None:
    weight = make_weight(20, 64, 32)
    qweight, scales, _, _ = weight.arguments
    assert qweight is not None
    assert scales is not None
    stacks = (torch.stack([qweight] * 2), torch.stack([scales] * 2), None, None, None)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hfq.cpu_experts_linear(torch.zeros(4, 64), counts, *stacks, *weight.sizes, False)


def test_unaligned_tensors(isa: str, make_weight: MakeWeight, generator: torch.Generator) -> None:
    """Contiguous tensors may begin at any element of their storage."""
    weight = make_weight(32, 64, 32)
    shifted = []
    for tensor in weight.arguments:
        if tensor is None:
            shifted.append(None)
            continue
        storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        shifted.append(storage[1:].view(tensor.shape).copy_(tensor))
    x = torch.randn(2, 64, generator=generator)
    y = torch.ops.hfq.cpu_linear(x, *shifted, None, *weight.sizes, False)
    assert torch.equal(y, weight.linear(x))


# ---- refusals: nothing is read before everything is checked


def _arguments(make_weight: MakeWeight, **changes: object) -> list[object]:
    weight = make_weight(20, 64, 32, kind="int4_zeros")
    qweight, scales, zeros, _ = weight.arguments
    arguments: dict[str, object] = {
        "x": torch.zeros(3, 64),
        "qweight": qweight,
        "scales": scales,
        "zeros": zeros,
        "codebook": None,
        "bias": None,
        "bits": 4,
        "group_size": 32,
        "in_features": 64,
        "out_features": 20,
        "int8": False,
    }
    assert set(changes) <= set(arguments)
    return list((arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8"),
        ({"bits": 3}, "qweight must be of shape"),
        ({"bits": 3, "group_size": 16}, "group_size must be a multiple of 32"),
        ({"bits": 8}, "qweight must be of shape"),
        ({"group_size": 12}, "group_size must be a multiple of 8"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -32}, "group_size"),
        ({"group_size": 64}, "scales must be of shape"),
        ({"in_features": -64}, "in_features"),
        ({"in_features": 0}, "in_features"),
        ({"in_features": 1 << 40}, "in_features"),
        ({"in_features": 72}, "qweight must be of shape"),
        ({"out_features": 0}, "out_features"),
        ({"out_features": -1}, "out_features"),
        ({"out_features": 33}, "qweight must be of shape"),
        ({"x": torch.zeros(3, 63)}, r"x must be of shape \[M, in_features=64\]"),
        ({"x": torch.zeros(64)}, "x must be of shape"),
        ({"x": torch.zeros(1, 3, 64)}, "x must be of shape"),
        ({"x": torch.zeros(3, 128)[:, ::2]}, "x must be contiguous"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "x must be float32, float16 or bfloat16"),
        ({"x": torch.zeros(3, 64, dtype=torch.int32)}, "x must be float32"),
        ({"qweight": torch.zeros(2, 8, 16, 4, dtype=torch.int8)}, "qweight must be uint8"),
        ({"qweight": torch.zeros(2, 7, 16, 4, dtype=torch.uint8)}, "qweight must be of shape"),
        ({"qweight": torch.zeros(1, 8, 16, 4, dtype=torch.uint8)}, "qweight must be of shape"),
        ({"qweight": torch.zeros(20, 32, 1, dtype=torch.uint8)}, "qweight must be of shape"),
        ({"qweight": torch.zeros(2, 8, 4, 16, dtype=torch.uint8).mT}, "qweight must be contiguous"),
        ({"scales": torch.zeros(2, 2, 15)}, "scales must be of shape"),
        ({"scales": torch.zeros(20, 2)}, "scales must be of shape"),
        ({"scales": torch.zeros(2, 2, 16, dtype=torch.float64)}, "scales must be float32"),
        ({"zeros": torch.zeros(2, 1, 16)}, "zeros must be of shape"),
        ({"zeros": torch.zeros(2, 2, 16, dtype=torch.float16)}, "zeros must be of the same dtype"),
        ({"codebook": torch.zeros(16)}, "a codebook takes no zeros"),
        ({"codebook": torch.zeros(15), "zeros": None}, "codebook must be of shape"),
        (
            {"codebook": torch.zeros(16, dtype=torch.float16), "zeros": None},
            "codebook must be float32",
        ),
        ({"bias": torch.zeros(19)}, "bias must be of shape"),
        ({"bias": torch.zeros(20, dtype=torch.int32)}, "bias must be float32"),
        ({"bias": torch.zeros(40)[::2]}, "bias must be contiguous"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    make_weight: MakeWeight, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hfq.cpu_linear(*_arguments(make_weight, **changes))
    del changes  # and the kernels work afterwards
    torch.ops.hfq.cpu_linear(*_arguments(make_weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook": torch.zeros(16)}, r"codebook must be of shape \[256\]"),
        ({"codebook": torch.zeros(256)}, "must be that of E4M3"),
        ({"codebook": e4m3_table().bfloat16()}, "codebook must be float32"),
        ({"zeros": torch.zeros(2, 1, 16)}, "a codebook takes no zeros"),
        ({"group_size": 32, "scales": torch.zeros(2, 2, 16)}, "E4M3 takes one group per row"),
        ({"bits": 2}, "qweight must be of shape"),
        ({"int8": True}, "E4M3 takes no int8_activations"),
    ],
    ids=str,
)
def test_bad_arguments_of_8_bit_floats_are_refused(
    make_weight: MakeWeight, changes: dict[str, object], message: str
) -> None:
    qweight, scales, _, codebook = make_weight(20, 64, 64, kind="float8").arguments
    arguments: dict[str, object] = {
        "x": torch.zeros(3, 64),
        "qweight": qweight,
        "scales": scales,
        "zeros": None,
        "codebook": codebook,
        "bias": None,
        "bits": 8,
        "group_size": 64,
        "in_features": 64,
        "out_features": 20,
        "int8": False,
    }
    assert set(changes) <= set(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hfq.cpu_linear(*(arguments | changes).values())


def test_truncated_storage_is_refused(make_weight: MakeWeight) -> None:
    weight = make_weight(20, 64, 32)
    qweight = weight.arguments[0]
    assert qweight is not None
    cut = qweight.clone()
    cut.untyped_storage().resize_(100)
    with pytest.raises(RuntimeError, match="qweight must be backed by enough storage"):
        torch.ops.hfq.cpu_dequantize(cut, *weight.arguments[1:], *weight.sizes, torch.float32)
    x = torch.zeros(2, 64)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="x must be backed by"):
        weight.linear(x)


def test_dequantize_refuses_other_dtypes(make_weight: MakeWeight) -> None:
    weight = make_weight(20, 64, 32)
    for dtype in (torch.int8, torch.float64):
        with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16"):
            weight.dequantize(dtype)


def test_lookup_refuses_bad_indices(make_weight: MakeWeight) -> None:
    weight = make_weight(20, 64, 32)

    def lookup(index: Tensor) -> Tensor:
        y: Tensor = torch.ops.hfq.cpu_lookup(index, *weight.arguments, *weight.sizes, torch.float32)
        return y

    for bad in (-1, 20, 1 << 40):
        with pytest.raises(RuntimeError, match=f"from 0 to 19, got {bad}"):
            lookup(torch.tensor([0, bad]))
    with pytest.raises(RuntimeError, match="index must be int64"):
        lookup(torch.tensor([0], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"index must be of shape \[T\]"):
        lookup(torch.tensor([[0]]))
    with pytest.raises(RuntimeError, match="index must be contiguous"):
        lookup(torch.arange(6)[::2])


# ---- PyTorch's own checks


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(make_weight: MakeWeight, generator: torch.Generator, kind: str) -> None:
    weight = make_weight(20, 64, 32, kind=kind)
    x = torch.randn(3, 64, generator=generator, requires_grad=True)
    linear = (x, *weight.arguments, torch.randn(20, generator=generator), *weight.sizes, False)
    torch.library.opcheck(torch.ops.hfq.cpu_linear.default, linear)
    torch.library.opcheck(
        torch.ops.hfq.cpu_dequantize.default, (*weight.arguments, *weight.sizes, torch.bfloat16)
    )
    index = torch.tensor([19, 0, 7])
    torch.library.opcheck(
        torch.ops.hfq.cpu_lookup.default, (index, *weight.arguments, *weight.sizes, torch.bfloat16)
    )
