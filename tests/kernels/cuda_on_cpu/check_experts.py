"""Experts of formats int8, fp8 and spqr: the operators of one launch against one expert after the other; see operators_on_cpu.py."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch
from operators_on_cpu import emulated, given_before, on_cpu, refused, strided
from torch import Tensor, nn

from hfq.core import affine
from hfq.core.spec import SpqrSpec
from hfq.core.weight import QuantizedWeight, SpqrGrid
from hfq.kernels import cuda_int8_ops, cuda_spqr, fp8, fp8_ops
from hfq.kernels.neutral_spqr import operands, sizes
from hfq.nn.layout import neutral_grid, to_kernel
from hfq.nn.packing import pack_weight
from hfq.nn.slot import PackedSlot

SPQR = on_cpu(cuda_spqr.CudaSpqr)
assert cuda_int8_ops.PIECE and fp8_ops.__all__ is not None  # define the operators
HFQ = torch.ops.hfq


def stacks(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of any kind `[E, N, K]` that are no NaN of E4M3, scales, bias."""
    codes = torch.randint(0, 127, (experts, rows, columns)) + 128 * torch.randint(
        0, 2, (experts, rows, columns)
    )
    return codes.to(torch.uint8), torch.rand(experts, rows, 1) * 0.01, torch.randn(experts, rows)


def int8(x: Tensor, counts: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    experts, rows, columns = codes.shape
    qweight = codes.view(experts, rows, columns // 16, 16, 1)
    y: Tensor = HFQ.cuda_int8_experts_linear(x, counts, qweight, scales, bias, columns, rows)
    return y


def e4m3(x: Tensor, counts: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = HFQ.cuda_fp8_experts_linear(x, counts, codes.unsqueeze(-1), scales, bias)
    return y


def expected(
    name: str, x: Tensor, counts: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """One expert after the other, in PyTorch."""
    y = x.new_zeros(len(x), codes.shape[1])
    first = 0
    for expert, count in enumerate(counts.tolist()):
        part = slice(first, first + count)
        first += count
        own = (scales[expert], None, None if bias is None else bias[expert])
        if name == "int8":
            stored = (codes[expert] ^ 128).unsqueeze(-1)
            y[part] = cuda_int8_ops.int8_linear(x[part], stored, *own, codes.shape[2])
        else:
            y[part] = fp8.linear(x[part], codes[expert].unsqueeze(-1), *own)
    return y


def check_products(name: str) -> None:
    product = {"int8": int8, "fp8": e4m3}[name]
    shapes = ((1, 1, 16), (3, 40, 144), (40, 17, 272), (4, 33, 1104))
    for (experts, rows, columns), each in itertools.product(shapes, (0, 3, 20)):
        codes, scales, bias = stacks(experts, rows, columns)
        counts = torch.randint(0, int(2 * each * experts / min(experts, 3)) + 1, (experts,))
        counts *= torch.rand(experts) < 3 / experts  # some have none
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            behind = 11 if dtype == torch.float16 else 0  # tokens of no expert
            x = torch.randn(int(counts.sum()) + behind, columns).to(dtype)
            emulated.set_multiprocessors(1 if behind else 100)
            own = bias if rows % 2 else None
            with given_before(counts):
                y = product(x, counts, codes, scales, own)
            wanted = expected(name, x, counts, codes, scales, own)
            assert y.dtype == dtype and y.shape == wanted.shape
            if name == "int8":
                assert torch.equal(y, wanted), (y - wanted).abs().max()
            else:
                bound = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-4}[dtype]
                torch.testing.assert_close(y, wanted, rtol=bound, atol=bound)


def spqr_stack(spec: SpqrSpec, experts: int, rows: int, columns: int) -> SpqrGrid:
    """In the layout of the CUDA kernels."""
    slot = PackedSlot(
        base="weight",
        format="spqr",
        spec=spec,
        out_features=rows,
        in_features=columns,
        experts=experts,
    )

    def encode(weight: Tensor) -> QuantizedWeight:
        return affine.encode(weight, *affine.range_grid(weight, spec), spec)

    tensors = pack_weight(torch.randn(slot.float_shape), slot, encode)
    grid, _ = to_kernel(neutral_grid(slot, tensors), tensors, SPQR)
    assert isinstance(grid, SpqrGrid)
    return grid


def check_spqr() -> None:
    specs = (
        SpqrSpec(bits=2, group_size=32, outliers=0.02),
        SpqrSpec(bits=3),
        SpqrSpec(bits=3, group_size=-1, stat_bits=8, scale_dtype="float32"),
        SpqrSpec(bits=4, group_size=48, stat_bits=6, stat_group_size=16, scale_dtype="bfloat16"),
        SpqrSpec(bits=4, group_size=64, outliers=0.0),
    )
    shapes = ((1, 1, 16), (20, 17, 272), (2, 70, 520))
    # With more than 8 tokens for each expert, they meet scaled weights.
    for spec, (experts, rows, columns), (dtype, most) in itertools.product(
        specs, shapes, ((torch.bfloat16, 20), (torch.float16, 20), (torch.bfloat16, 150))
    ):
        grid = spqr_stack(spec, experts, rows, columns)
        bias = torch.randn(experts, rows) if rows % 2 else None
        counts = torch.randint(0, most, (experts,)) * (torch.rand(experts) < 0.5)
        behind = 5 if dtype == torch.float16 or most > 100 else 0
        x = torch.randn(int(counts.sum()) + behind, columns).to(dtype)
        assert SPQR.reads_counts_on_device(x, len(x), grid)
        with given_before(counts):
            y = SPQR.experts(x, counts, grid, bias, False)
        wanted = torch.zeros(len(x), rows, dtype=dtype)
        for expert, part in enumerate(torch.arange(len(x) - behind).split(counts.tolist())):
            weight = SPQR.dequantize(grid.expert(expert), torch.float32)
            own = None if bias is None else bias[expert]
            wanted[part] = nn.functional.linear(x[part].float(), weight, own).to(dtype)
        bound = 2**-7 if dtype == torch.bfloat16 else 2**-9
        # Scaled weights are rounded to 16 bits; products add up to some 20.
        largest = 1 if len(x) <= 8 * experts else 20
        torch.testing.assert_close(y, wanted, rtol=bound, atol=bound * largest)


def check_counts_that_are_wrong() -> None:
    """Whatever they are, nothing is read or written beside x and y."""
    codes, scales, _ = stacks(4, 20, 32)
    grid = spqr_stack(SpqrSpec(), 4, 20, 32)
    x, many = torch.randn(30, 32).bfloat16(), torch.randn(50, 32).bfloat16()
    for counts in ((-5, 3, 1, 1), (100, 100, 0, 7), (1 << 40, -(1 << 50), 1 << 62, 0)):
        for product in (int8, e4m3):
            assert product(x, torch.tensor(counts), codes, scales, None).shape == (30, 20)
        for tokens in (x, many):
            y = SPQR.experts(tokens, torch.tensor(counts), grid, None, False)
            assert y.shape == (len(tokens), 20)


def check_arguments() -> None:
    codes, scales, bias = stacks(3, 20, 32)
    x, counts = torch.randn(6, 32).bfloat16(), torch.tensor([2, 0, 4])
    for product in (int8, e4m3):
        product(x[:, :32], counts, codes, scales, bias.half())
        for words, changed in (
            ("counts must be int64", (x, counts.int(), codes, scales, bias)),
            ("counts must be of shape", (x, counts[:2], codes, scales, bias)),
            ("x must be of shape", (x[:, :16].contiguous(), counts, codes, scales, bias)),
            ("x must be float32, float16 or", (x.double(), counts, codes, scales, bias)),
            ("qweight must be uint8", (x, counts, codes.view(torch.int8), scales, bias)),
            ("qweight must be contiguous", (x, counts, strided(codes), scales, bias)),
            ("scales must be of shape", (x, counts, codes, scales[:, 1:], bias)),
            ("bias must be of shape", (x, counts, codes, scales, bias[0])),
            ("1 to 1024 experts", (x, counts[:0], codes[:0], scales[:0], bias[:0])),
        ):
            refused(words, lambda p=product, c=changed: p(*c))
    grid = spqr_stack(SpqrSpec(), 3, 20, 32)
    for words, tokens, count, changes in (
        ("counts must be int64", x, counts.int(), {}),
        ("counts must be of shape", x, counts[:2], {}),
        ("x must be float16 or", x.float(), counts, {}),
        ("offsets must be of shape", x, counts, {"offsets": grid.offsets[:, 1:].contiguous()}),
        ("columns must be of shape", x, counts, {"columns": grid.columns[0]}),
        ("values must be of shape", x, counts, {"values": grid.values[:2]}),
        ("stats must be of shape", x, counts, {"stats": grid.stats[1:]}),
    ):
        given = replace(grid, **changes)
        arguments = (tokens, count, *operands(given), None, *sizes(given), 20)
        refused(words, lambda a=arguments: HFQ.cuda_spqr_experts_linear(*a))
    refused("in_features must be", lambda: int8(x, counts, codes[..., :0], scales, None))
    refused("of shape", lambda: HFQ.cuda_fp8_experts_linear(x, counts, codes, scales, None))


def check_schemas() -> None:
    codes, scales, bias = stacks(3, 20, 32)
    x, counts = torch.randn(6, 32).bfloat16(), torch.tensor([2, 0, 4])
    qweight = codes.view(3, 20, 2, 16, 1)
    check = torch.library.opcheck
    check(HFQ.cuda_int8_experts_linear.default, (x, counts, qweight, scales, bias, 32, 20))
    check(HFQ.cuda_fp8_experts_linear.default, (x, counts, codes.unsqueeze(-1), scales, bias))
    grid = spqr_stack(SpqrSpec(), 3, 20, 32)
    arguments = (x, counts, *operands(grid), bias, *sizes(grid), 20)
    check(HFQ.cuda_spqr_experts_linear.default, arguments)


torch.manual_seed(int(sys.argv[2]))
check_products("int8")
check_products("fp8")
check_spqr()
check_counts_that_are_wrong()
check_arguments()
check_schemas()
sys.stdout.write("all checks passed\n")
