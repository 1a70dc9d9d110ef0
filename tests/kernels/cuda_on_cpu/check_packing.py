"""Run by test_cuda_packing_emulated.py in a process of its own: operators that pack weights are on the CPU those of CUDA, emulated.

See operators_on_cpu.py.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from operators_on_cpu import refused, strided

from hfq.algorithms import ALGORITHMS
from hfq.core import affine
from hfq.core.spec import CodebookSpec, Int8Spec, IntSpec, QuantSpec
from hfq.kernels import cuda_packing_ops, fragments
from hfq.nn.packing import pack_weight
from hfq.nn.slot import PackedSlot

ops = torch.ops.hfq
RTN = ALGORITHMS.get("rtn")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WEIGHT = torch.randn(33, 136)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Weights are packed as on CUDA: its code for hfq::group_range and nearest_codes stands for PyTorch's."""
    mine = {
        "group_range": cuda_packing_ops._group_range,
        "nearest_codes": cuda_packing_ops._nearest_codes,
        "pack_codes": cuda_packing_ops._pack_codes,
    }
    before = {name: getattr(ops, name) for name in mine}
    cuda_packing_ops._is_native = lambda tensor: tensor.numel() > 0
    for name, function in mine.items():
        setattr(ops, name, function)
    yield
    for name, function in before.items():
        setattr(ops, name, function)


def check_packed() -> None:
    """Whole weights and stacks, what is stored to the bit; slices of rows in their own dtype."""
    specs: tuple[tuple[str, QuantSpec], ...] = (
        *(
            ("int", IntSpec(bits=bits, group_size=32, sym=sym))
            for bits in (2, 3, 4, 8)
            for sym in (True, False)
        ),
        ("nf4", CodebookSpec(codebook="nf4", group_size=64, double_quant=True)),
        ("int8", Int8Spec()),
    )
    for (format, spec), dtype, experts in itertools.product(specs, FLOATS, (None, 3)):
        sizes = {"out_features": 48, "in_features": 136, "experts": experts}
        slot = PackedSlot(base="weight", format=format, spec=spec, **sizes)
        weight = torch.randn(slot.float_shape).to(dtype)
        encode = partial(RTN.quantize, spec=spec, options=RTN.options)
        wanted = pack_weight(weight, slot, encode)
        with as_on_a_gpu():
            mine = pack_weight(weight, slot, encode)
        assert mine.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(mine[key], tensor), (format, spec, dtype, experts, key)


def check_arguments() -> None:
    scales = affine.range_grid(WEIGHT, IntSpec(bits=4, group_size=32))[0]
    zeros, points = torch.zeros_like(scales), torch.arange(16.0)
    codes = torch.zeros(33, 68, 1, dtype=torch.uint8)
    for dtype in FLOATS:
        check = torch.library.opcheck
        check(ops.cuda_group_range.default, (WEIGHT.to(dtype), 32))
        check(ops.cuda_nearest_codes.default, (WEIGHT.to(dtype), scales, zeros, None, 4, 32))
        check(ops.cuda_nearest_codes.default, (WEIGHT.to(dtype), scales, None, points, 4, 32))
    torch.library.opcheck(ops.cuda_to_fragments.default, (codes, 4, False))
    torch.library.opcheck(ops.cuda_pack_codes.default, (codes[..., 0], 3))
    assert ops.cuda_group_range(WEIGHT, 10**12)[0].shape == (33, 1)
    refused("weight must be float32, float16", ops.cuda_group_range, WEIGHT.double(), 32)
    refused("weight must be of shape", ops.cuda_group_range, WEIGHT[0], 32)
    refused("weight must be contiguous", ops.cuda_group_range, strided(WEIGHT), 32)
    refused("group_size must be positive", ops.cuda_group_range, WEIGHT, 0)
    refused("K must be between", ops.cuda_group_range, WEIGHT[:, :0], 32)
    nearest = ops.cuda_nearest_codes
    refused("scales must be float32", nearest, WEIGHT, scales.half(), None, None, 4, 32)
    refused("scales must be of shape", nearest, WEIGHT, scales, None, None, 4, 64)
    refused("zeros must be of shape", nearest, WEIGHT, scales, zeros[1:], None, 4, 32)
    refused("codebook must be of shape", nearest, WEIGHT, scales, None, points[1:], 4, 32)
    refused("a codebook takes no zeros", nearest, WEIGHT, scales, zeros, points, 4, 32)
    refused("bits must be 1 to 8", nearest, WEIGHT, scales, None, None, 9, 32)
    refused("bits must be 1 to 8", ops.cuda_pack_codes, codes[..., 0], 0)
    refused("codes must be uint8 of shape", ops.cuda_pack_codes, codes, 4)
    refused("codes must be contiguous", ops.cuda_pack_codes, strided(codes[..., 0]), 4)
    refused("bits must be 2, 3, 4 or 8", ops.cuda_to_fragments, codes, 5, False)
    refused("qweight must be uint8 of shape", ops.cuda_to_fragments, codes[..., 0], 4, False)
    refused("qweight must be contiguous", ops.cuda_to_fragments, strided(codes), 4, False)


def check_layout() -> None:
    """Stacks whose tiles end where their weights do, and others."""
    for bits, rows, halves in itertools.product(fragments.BITS, (32, 33), (False, True)):
        neutral = torch.randint(0, 256, (2, 3, rows, 17 * bits, 1), dtype=torch.uint8)
        with as_on_a_gpu():
            mine = cuda_packing_ops.to_fragments(neutral, bits, halves)
            back = fragments.from_fragments(mine, neutral.shape, bits, halves)
        assert torch.equal(mine, fragments.to_fragments(neutral, bits, halves))
        assert torch.equal(back, neutral)


check_arguments()
check_packed()
check_layout()
sys.stdout.write("all checks passed\n")
