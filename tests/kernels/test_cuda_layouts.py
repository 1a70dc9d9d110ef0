"""CUDA's layouts of codes and scales: every tensor comes back as it was, and stands where kernels look for it."""

from __future__ import annotations

import pytest
import torch

from hfq.core import bits as bit_packing
from hfq.kernels import fragments, spqr_fragments


@pytest.mark.parametrize("bits", fragments.BITS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 128), (17, 136), (33, 264)])
def test_round_trip(
    generator: torch.Generator, bits: int, lead: tuple[int, ...], rows: int, columns: int
) -> None:
    shape = (*lead, rows, columns * bits // 8, 1)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tiles = fragments.to_fragments(codes, bits)
    width = 128 if bits == 3 else 256 // bits
    blocks = -(-columns // width)
    assert tiles.shape == (*lead, -(-rows // 16), blocks, 48 if bits == 3 else 32, 16)
    assert tiles.is_contiguous()
    assert torch.equal(fragments.from_fragments(tiles, shape, bits), codes)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scales = torch.randn(*lead, rows, 5, generator=generator).to(dtype)
        pairs = fragments.to_fragments(scales, bits)
        assert pairs.shape == (*lead, -(-rows // 16), 5, 8, 2)
        assert pairs.is_contiguous()
        n = rows - 1
        assert torch.equal(pairs[..., n // 16, :, n % 8, n // 8 % 2], scales[..., n, :])
        assert torch.equal(fragments.from_fragments(pairs, scales.shape, bits), scales)


@pytest.mark.parametrize("bits", fragments.BITS)
def test_conversion_in_pieces(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, bits: int
) -> None:
    codes = torch.randint(0, 256, (100, 17 * bits, 1), generator=generator, dtype=torch.uint8)
    whole = fragments.to_fragments(codes, bits)
    monkeypatch.setattr(fragments, "_CHUNK", 32 * 136)
    assert torch.equal(fragments.to_fragments(codes, bits), whole)
    assert torch.equal(fragments.from_fragments(whole, codes.shape, bits), codes)


def test_8_bit_codes_are_an_operand_of_integer_products(generator: torch.Generator) -> None:
    """mma.m16n8k32: register 0 has row g, 1 row g + 8, of the first four columns of a lane, 2 and 3 of the others."""
    codes = torch.randint(0, 256, (16, 32, 1), generator=generator, dtype=torch.uint8)
    lanes = fragments.to_fragments(codes, 8)[0, 0].view(8, 4, 2, 2, 4)
    for (g, t), lane in zip(
        torch.cartesian_prod(torch.arange(8), torch.arange(4)), lanes.flatten(0, 1), strict=True
    ):
        for register, row in ((0, g), (1, g + 8)):
            columns = codes[row, 8 * t : 8 * t + 8, 0]
            assert torch.equal(lane[:, register].flatten(), columns)


# ---- format spqr


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 128), (17, 136), (33, 264)])
def test_codes_round_trip(
    generator: torch.Generator, bits: int, lead: tuple[int, ...], rows: int, columns: int
) -> None:
    shape = (*lead, rows, columns * bits // 8, 1)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tiles = fragments.to_fragments(codes, bits, halves=True)
    assert tiles.is_contiguous()
    assert tiles.shape == fragments.to_fragments(codes, bits).shape
    assert torch.equal(fragments.from_fragments(tiles, shape, bits, halves=True), codes)


def test_a_matrix_instruction_has_the_columns_of_one_group(generator: torch.Generator) -> None:
    """4 bits: word 2 unit + j of a lane belongs to instruction j."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    codes[:, 16:32] = 15
    tiles = fragments.to_fragments(bit_packing.pack(codes, 4).unsqueeze(-1), 4, halves=True)
    words = tiles[0, 0].view(32, 4, 4)
    assert (words[:, 1] == 255).all()
    assert (words[:, [0, 2, 3]] == 0).all()


@pytest.mark.parametrize("stat_bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (16, 8), (17, 9), (33, 5)])
def test_codes_of_scales_round_trip(
    generator: torch.Generator, stat_bits: int, lead: tuple[int, ...], rows: int, groups: int
) -> None:
    codes = torch.randint(
        1 << stat_bits, (*lead, rows, groups, 2), generator=generator, dtype=torch.uint8
    )
    neutral = bit_packing.pack(codes.flatten(-2), stat_bits).unsqueeze(-1)
    pairs = spqr_fragments.to_stat_pairs(neutral, stat_bits)
    room = spqr_fragments.stat_groups(neutral.shape[-2], stat_bits)
    assert groups <= room <= groups + 1
    assert pairs.shape == (*lead, -(-rows // 16), room, 8, 2 if stat_bits <= 4 else 4)
    assert pairs.is_contiguous()
    n = rows - 1
    pair = pairs[..., n // 16, :groups, n % 8, :]
    if stat_bits <= 4:
        one = pair[..., n // 8 % 2]
        found = torch.stack([one & 15, one >> 4], -1)
    else:
        found = pair.unflatten(-1, (2, 2))[..., n // 8 % 2, :]
    assert torch.equal(found, codes[..., n, :, :])
    back = spqr_fragments.from_stat_pairs(pairs, tuple(neutral.shape), stat_bits)
    assert torch.equal(back, neutral)
