"""The reference kernel against the formula of each layout, element by element."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine, bits
from hfq.core.codebooks import codebook
from hfq.core.spec import CodebookSpec, IntSpec
from hfq.kernels import reference

MakeWeight = Callable[..., Tensor]


def random_codes(shape: tuple[int, ...], width: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1 << width, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_integers(
    width: int, asymmetric: bool, scale_dtype: torch.dtype, generator: torch.Generator
) -> None:
    codes = random_codes((3, 11), width, generator)
    scales = torch.randn(3, 3, generator=generator).to(scale_dtype)
    zeros = torch.randn(3, 3, generator=generator).to(scale_dtype) if asymmetric else None
    packed = bits.pack(codes, width).unsqueeze(-1)
    weight = reference.dequantize(packed, scales, zeros, None, None, width, 4, 11, torch.float32)
    for n in range(3):
        for k in range(11):
            zero = 2 ** (width - 1) if zeros is None else zeros[n, k // 4].float()
            assert weight[n, k] == (int(codes[n, k]) - zero) * scales[n, k // 4].float()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks(name: str, generator: torch.Generator) -> None:
    codes = random_codes((3, 11), 4, generator)
    scales = torch.randn(3, 1, generator=generator).half()
    table = codebook(name)
    weight = reference.dequantize(
        bits.pack(codes, 4).unsqueeze(-1), scales, None, table, None, 4, 11, 11, torch.float32
    )
    assert torch.equal(weight, table[codes.long()] * scales.float())


def test_columns_that_name_their_group(generator: torch.Generator) -> None:
    codes = random_codes((2, 6), 4, generator)
    scales = torch.randn(2, 3, generator=generator)
    zeros = torch.randn(2, 3, generator=generator)
    g_idx = torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32)
    weight = reference.dequantize(
        bits.pack(codes, 4).unsqueeze(-1), scales, zeros, None, g_idx, 4, 2, 6, torch.float32
    )
    for n in range(2):
        for k in range(6):
            group = int(g_idx[k])
            assert weight[n, k] == (int(codes[n, k]) - zeros[n, group]) * scales[n, group]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_result_is_rounded_once(dtype: torch.dtype, generator: torch.Generator) -> None:
    packed = bits.pack(random_codes((4, 16), 4, generator), 4).unsqueeze(-1)
    scales = torch.randn(4, 2, generator=generator).half()
    arguments = (packed, scales, None, None, None, 4, 8, 16)
    exact = reference.dequantize(*arguments, torch.float32)
    result = reference.dequantize(*arguments, dtype)
    assert result.dtype == dtype and torch.equal(result, exact.to(dtype))


@pytest.mark.parametrize("lead", [(2,), (2, 3), (0,)])
def test_stacks(lead: tuple[int, ...], generator: torch.Generator) -> None:
    codes = random_codes((*lead, 5, 9), 3, generator)
    scales = torch.randn(*lead, 5, 3, generator=generator)
    zeros = torch.randn(*lead, 5, 3, generator=generator)
    packed = bits.pack(codes, 3).unsqueeze(-1)
    stack = reference.dequantize(packed, scales, zeros, None, None, 3, 4, 9, torch.float32)
    assert stack.shape == (*lead, 5, 9)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in lead)).view(-1, len(lead)):
        at = tuple(index.tolist())
        one = reference.dequantize(
            packed[at], scales[at], zeros[at], None, None, 3, 4, 9, torch.float32
        )
        assert torch.equal(stack[at], one)


@pytest.mark.parametrize("spec", [IntSpec(group_size=8, sym=False), CodebookSpec(group_size=8)])
def test_pieces_of_rows_do_not_show(
    spec: IntSpec, random_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(7, 20)
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    table = codebook("nf4") if isinstance(spec, CodebookSpec) else None
    packed = bits.pack(quantized.codes, 4).unsqueeze(-1)
    monkeypatch.setattr(reference, "_CHUNK", 41)  # two rows of 20
    result = reference.dequantize(
        packed, quantized.scales, quantized.zeros, table, None, 4, 8, 20, torch.float32
    )
    assert torch.equal(result, quantized.dequantize())


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (1, 1), (1, 9)])
def test_the_smallest_weights(rows: int, columns: int, generator: torch.Generator) -> None:
    codes = random_codes((rows, columns), 4, generator)
    weight = reference.dequantize(
        bits.pack(codes, 4).unsqueeze(-1),
        torch.ones(rows, 1),
        None,
        None,
        None,
        4,
        columns,
        columns,
        torch.float32,
    )
    assert torch.equal(weight, codes.float() - 8)
