"""Bit packing against one long Python integer per row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfq.core import bits as bit_packing

WIDTHS = range(1, 9)
LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 129)


def naive_pack(codes: list[int], bits: int) -> list[int]:
    """The definition: code k occupies the bits [k*bits, (k+1)*bits) of a little-endian stream."""
    stream = sum(code << (k * bits) for k, code in enumerate(codes))
    return list(stream.to_bytes((len(codes) * bits + 7) // 8, "little"))


def random_codes(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
def test_pack_writes_the_bit_stream(bits: int, length: int, generator: torch.Generator) -> None:
    codes = random_codes((4, length), bits, generator)
    codes[0], codes[1] = 0, (1 << bits) - 1
    packed = bit_packing.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (4, bit_packing.packed_bytes(length, bits))
    assert packed.tolist() == [naive_pack(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
def test_unpack_inverts_pack(bits: int, length: int, generator: torch.Generator) -> None:
    codes = random_codes((3, length), bits, generator)
    unpacked = bit_packing.unpack(bit_packing.pack(codes, bits), bits, length)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3)])
def test_any_leading_dimensions(
    bits: int, lead: tuple[int, ...], generator: torch.Generator
) -> None:
    codes = random_codes((*lead, 13), bits, generator)
    packed = bit_packing.pack(codes, bits)
    assert packed.shape == (*lead, bit_packing.packed_bytes(13, bits))
    assert torch.equal(bit_packing.unpack(packed, bits, 13), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strides_do_not_matter(bits: int, generator: torch.Generator) -> None:
    codes = random_codes((11, 6), bits, generator).T
    packed = bit_packing.pack(codes, bits)
    assert packed.tolist() == [naive_pack(row, bits) for row in codes.tolist()]
    strided = packed.T.contiguous().T
    assert torch.equal(bit_packing.unpack(strided, bits, 11), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_arguments_are_only_read(bits: int, generator: torch.Generator) -> None:
    codes = random_codes((2, 9), bits, generator)
    before = codes.clone()
    packed = bit_packing.pack(codes, bits)
    packed_before = packed.clone()
    bit_packing.unpack(packed, bits, 9)
    assert torch.equal(codes, before) and torch.equal(packed, packed_before)


def test_the_drawing_of_the_module() -> None:
    """Four bits: byte j = code[2j] | code[2j+1] << 4."""
    codes = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)
    assert bit_packing.pack(codes, 4).tolist() == [[0x21, 0x43, 0x05]]
