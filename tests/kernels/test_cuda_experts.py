"""Fused experts on a GPU: the kernel against one product for each expert, and modules that nobody waits for."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from on_gpu import captured
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hfq.core import affine
from hfq.core import bits as bit_packing
from hfq.core.codebooks import codebook
from hfq.core.float8 import e4m3_table
from hfq.core.spec import CodebookSpec, Fp8Spec, Int8Spec, IntSpec, QuantSpec, SpqrSpec
from hfq.core.weight import PackedGrid, QuantizedWeight
from hfq.kernels import cuda as cuda_row
from hfq.kernels import dispatch, native
from hfq.kernels.row import Problem
from hfq.nn.experts import QuantExperts, expert_weights, pack_experts_
from hfq.nn.layout import neutral_grid, to_kernel
from hfq.nn.packing import pack_weight
from hfq.nn.slot import PackedSlot

pytestmark = pytest.mark.gpu

KINDS = ("int2", "int2_zeros", "int3", "int3_zeros", "int4", "int4_zeros", "int8", "int8_zeros")
HALVES = (torch.bfloat16, torch.float16)
ROW = cuda_row.CudaFragments()
SPECS: tuple[tuple[str, QuantSpec], ...] = (
    ("int", IntSpec(bits=4, group_size=64)),
    ("int", IntSpec(bits=3, group_size=64, sym=False)),
    ("nf4", CodebookSpec(group_size=64)),
    ("fp8", Fp8Spec()),
    ("fp8", Fp8Spec(activation="dynamic")),
    ("int8", Int8Spec(activation="dynamic")),
    ("spqr", SpqrSpec(bits=3)),
    ("spqr", SpqrSpec(bits=4, group_size=64, stat_bits=8)),
)


@pytest.fixture
def gpu(cuda: torch.device) -> torch.device:
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")
    return cuda


def stack(
    experts: int, rows: int, columns: int, kind: str, generator: torch.Generator, at: torch.device
) -> PackedGrid:
    """Random weights of so many experts, groups of 64, in the kernel's layout."""
    bits = 8 if kind == "e4m3" else int(kind.removesuffix("_zeros")[-1])
    groups = -(-columns // 64)
    shape = (experts, rows, columns)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    table = None
    if kind == "e4m3":
        codes[codes & 0x7F == 0x7F] ^= 1  # NaN, which no weight has
        table = e4m3_table(at)
    elif not kind.startswith("int"):
        table = codebook(kind).to(at)
    packed = torch.stack([bit_packing.pack(one, bits) for one in codes]).unsqueeze(-1).to(at)
    scales = (torch.rand(experts, rows, groups, generator=generator) * 0.02 + 1e-3).half().to(at)
    zeros = None
    if kind.endswith("zeros"):
        zeros = torch.rand(experts, rows, groups, generator=generator) * ((1 << bits) - 1)
        zeros = ROW.prepare(zeros.half().to(at), bits)
    return PackedGrid(
        qweight=ROW.prepare(packed, bits),
        scales=ROW.prepare(scales, bits),
        zeros=zeros,
        codebook=table,
        g_idx=None,
        bits=bits,
        group_size=64,
        in_features=columns,
        out_features=rows,
    )


def routings(experts: int, tokens: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield torch.zeros(experts, dtype=torch.int64)
    alone = torch.zeros(experts, dtype=torch.int64)
    alone[experts // 2] = tokens
    yield alone
    chosen = torch.randint(experts + 1, (tokens,), generator=generator)
    yield torch.bincount(chosen, minlength=experts)[:experts]


@pytest.mark.parametrize("kind", [*KINDS, "nf4", "fp4", "e4m3"])
@pytest.mark.parametrize("shape", [(1, 37, 200), (8, 256, 1024), (128, 96, 256)], ids=str)
def test_experts_are_products_one_by_one(
    gpu: torch.device, generator: torch.Generator, shape: tuple[int, int, int], kind: str
) -> None:
    grid = stack(*shape, kind, generator, gpu)
    experts, rows, columns = shape
    for dtype in HALVES:
        bias = torch.randn(experts, rows, generator=generator).to(gpu, dtype)
        for tokens in (1, 8, 33, 300):
            x = torch.randn(tokens, columns, generator=generator).to(gpu, dtype)
            for counts in routings(experts, tokens, generator):
                operands = (grid.qweight, grid.scales, grid.zeros, grid.codebook, bias)
                sizes = (grid.bits, 64, columns, rows)
                there = counts.to(gpu)
                y = torch.ops.hfq.cuda_experts_linear(x, there, *operands, *sizes)
                total = int(counts.sum())
                assert not y[total:].any()
                again = torch.ops.hfq.cuda_experts_linear(x, there, *operands, *sizes)
                assert torch.equal(y, again), "sums are in one order"
                for expert, own in enumerate(x[:total].split(counts.tolist())):
                    if len(own):
                        first = int(counts[:expert].sum())
                        weight = ROW.dequantize(grid.expert(expert), torch.float32).double()
                        expected = own.double() @ weight.T + bias[expert].double()
                        largest = own.double().abs() @ weight.abs().T
                        table = 0.0 if grid.codebook is None else torch.finfo(dtype).eps / 2
                        bound = (1e-5 + table) * largest + torch.finfo(dtype).eps * expected.abs()
                        error = (y[first : first + len(own)].double() - expected).abs()
                        assert (error <= bound + 1e-6).all(), (error / bound).max()


@pytest.mark.parametrize("plan", SPECS[3:], ids=lambda plan: f"{plan[0]}{plan[1].bits}")
@pytest.mark.parametrize("shape", [(1, 48, 208), (8, 256, 1024), (128, 96, 256)], ids=str)
def test_experts_of_other_formats(
    gpu: torch.device,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    plan: tuple[str, QuantSpec],
) -> None:
    """One launch gives what one product for each expert gives."""
    (experts, rows, columns), (format_name, spec) = shape, plan
    slot = PackedSlot(
        base="weight",
        format=format_name,
        spec=spec,
        out_features=rows,
        in_features=columns,
        experts=experts,
    )

    def encode(weight: Tensor) -> QuantizedWeight:
        return affine.encode(weight, *affine.range_grid(weight, spec), spec)

    held = pack_weight(torch.randn(slot.float_shape, generator=generator).to(gpu), slot, encode)
    grid = neutral_grid(slot, held)
    row = dispatch.select(Problem.of(grid)).row
    if not row.name.startswith("cuda"):
        pytest.skip(f"{row.name} is chosen")
    ready, _ = to_kernel(grid, held, row)
    for dtype in HALVES:
        bias = torch.randn(experts, rows, generator=generator).to(gpu, dtype)
        for tokens in (1, 8, 33, 300):
            x = torch.randn(tokens, columns, generator=generator).to(gpu, dtype)
            for counts in routings(experts, tokens, generator):
                assert row.reads_counts_on_device(x, tokens, ready)
                y = row.experts(x, counts.to(gpu), ready, bias, False)
                expected = torch.zeros_like(y)
                for expert, own in enumerate(
                    torch.arange(int(counts.sum())).split(counts.tolist())
                ):
                    # Of many tokens E4M3 takes another way, whose sums are rounded to bfloat16.
                    for some in own.split(32):
                        one = ready.expert(expert)
                        expected[some] = row.linear(x[some], one, bias[expert], False)
                bound = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
                torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=bound)


def test_wrong_counts_harm_nobody(gpu: torch.device, generator: torch.Generator) -> None:
    grid = stack(3, 37, 200, "int4", generator, gpu)
    memory = torch.full((1 << 20,), 7.0, device=gpu, dtype=torch.bfloat16)
    x = torch.randn(10, 200, generator=generator).to(gpu, torch.bfloat16)
    for counts in ((5, 5, 5), (-(1 << 62), 1 << 62, 1), (1 << 40, 1 << 40, 1 << 40)):
        ROW.experts(x, torch.tensor(counts, device=gpu), grid, None, False)
    torch.cuda.synchronize()
    assert (memory == 7).all()


EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 256, 192


def module(
    plan: tuple[str, QuantSpec], generator: torch.Generator, at: torch.device
) -> tuple[QuantExperts, nn.Module]:
    """A packed module on the GPU, and the float one with the weights behind its codes."""
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS
    )
    reference = MixtralExperts(config)
    reference.config._experts_implementation = "batched_mm"
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.1, generator=generator)
    weights = {base: getattr(reference, base).detach() for base in expert_weights(reference)}
    packed = pack_experts_(copy.deepcopy(reference), dict.fromkeys(weights, plan), torch.bfloat16)
    for base, weight in weights.items():
        packed.requantize(base, weight)
    packed.to(at).eval()
    for base in weights:
        chosen = packed.kernel_choice(base)
        if not chosen.row.name.startswith("cuda"):
            pytest.skip(f"{chosen.row.name}: {chosen.refused}")  # E4M3 on both sides needs 8.9
        setattr(reference, base, nn.Parameter(packed.dequantize(base).float()))
    return packed, reference.to(at)


def routing(
    tokens: int, generator: torch.Generator, at: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, HIDDEN, generator=generator).to(at, torch.bfloat16)
    scores = torch.rand(tokens, EXPERTS, generator=generator).to(at)
    weights, index = scores.softmax(-1).topk(TOP_K, dim=-1)
    return x, index, weights


def check(
    y: Tensor,
    reference: nn.Module,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    tolerance: float = 0.02,
) -> None:
    here = index < EXPERTS
    expected = reference(x.float(), index.where(here, 0), weights.where(here, 0.0))
    torch.testing.assert_close(
        y.float(), expected, rtol=0, atol=tolerance * expected.abs().max().item()
    )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("plan", SPECS, ids=lambda plan: f"{plan[0]}{plan[1].bits}")
def test_modules_do_not_wait(
    gpu: torch.device, generator: torch.Generator, plan: tuple[str, QuantSpec]
) -> None:
    packed, reference = module(plan, generator, gpu)
    # The reference has no activations of 8 bits.
    tolerance = 0.02 if plan[1].activation is None else 0.1
    for tokens in (1, 5, 64):
        x, index, weights = routing(tokens, generator, gpu)
        index[0, 0] = EXPERTS + 3  # is elsewhere
        with torch.no_grad():
            packed(x, index, weights)  # PyTorch loads its own kernels
            try:
                torch.cuda.set_sync_debug_mode("error")
                y = packed(x, index, weights)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            check(y, reference, x, index, weights, tolerance)


def test_more_tokens_and_gradients(
    gpu: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_row, "_EXPERT_PRODUCTS", 1)
    packed, reference = module(SPECS[0], generator, gpu)
    tokens = (cuda_row.MAX_EXPERT_TOKENS + 1) * EXPERTS // TOP_K
    x, index, weights = routing(tokens, generator, gpu)
    with torch.no_grad():
        check(packed(x, index, weights), reference, x, index, weights)
    x, index, weights = routing(5, generator, gpu)
    leaf, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    packed(leaf, index, weights).sum().backward()
    reference(wide, index, weights).sum().backward()
    assert leaf.grad is not None and wide.grad is not None
    tolerance = 0.03 * wide.grad.abs().max().item()
    torch.testing.assert_close(leaf.grad.float(), wide.grad, rtol=0, atol=tolerance)


def test_a_module_in_a_cuda_graph(gpu: torch.device, generator: torch.Generator) -> None:
    """Captured with one routing, replayed with others."""
    packed, reference = module(SPECS[0], generator, gpu)
    held = routing(3, generator, gpu)
    with torch.no_grad():
        graph, y = captured(lambda: packed(*held))
        for _ in range(3):
            for mine, new in zip(held, routing(3, generator, gpu), strict=True):
                mine.copy_(new)
            held[1][2] = EXPERTS
            graph.replay()
            check(y, reference, *held)
            assert torch.equal(y, packed(*held))
