"""CUDA kernels on the ``fragments`` layout: integers of 2, 3, 4 and 8 bits, codebooks of 4.

Up to `max_direct_tokens`: the packed weight is read directly (`cuda_linear`). More: it is dequantized, some rows at a time, and
multiplied by the matrix library, which costs another pass over 16 bits per weight and reuses it for all tokens. The tokens of all
experts of a layer go through one launch that finds each expert's on the device (`cuda_experts_linear`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.weight import Fp8Grid, Grid, PackedGrid
from . import fragments
from .cpu import call
from .cuda_machine import no_native_code
from .cuda_ops import fragments_weight
from .cuda_packing_ops import to_fragments
from .dense_products import native_dtype
from .row import AllAtOnce, Problem, stack_tiles

__all__ = [
    "MAX_EXPERT_TOKENS",
    "CudaFragments",
    "max_direct_tokens",
    "most_expert_tokens",
    "no_native_code",
    "takes_all_experts",
]

# Directly, and with dequantizing and the matrix library, in microseconds, int4. On an H100 with
# the kernel for older GPUs, 4096 x 14336, 66 and 130 for 128 and 256 tokens, beside 105 and 109.
# On an H200 in pairs of blocks (kernels/cuda/wgmma_pair.h), 512, 1024 and 1536 tokens (K x N):
#   4096 x 14336    88, 186 and 253   beside 131, 204 and  305
#   14336 x 4096    92, 176 and 272   beside 123, 197 and  290
#   8192 x 28672   314, 624 and 968   beside 530, 861 and 1230
# So do 8 bits, nf4 and E4M3, which gain less (0 to 23 % with 1536). Zero points go through float32: they
# gain 3 to 32 % with 768 and lose up to 2 % with 1024; so do float16 activations with scales of
# another dtype, which were not measured. 4096 x 4096 is too small for them: 512 tokens would take
# 33 and 36.
_DIRECT_TOKENS = 192
_DIRECT_TOKENS_LARGE, _DIRECT_TOKENS_LARGE_FLOATS = 1536, 768
# For weights of no more numbers it is not measured (pairs take them, too), nor for GPUs without the instructions.
_SMALL, _WGMMA, _WGMMA_VARIABLE = 1 << 25, (9, 0), "HFQ_CUDA_WGMMA"
# Of a stage of pairs, which float16 has to fill (takes_pairs in kernels/cuda/wgmma.cu says why).
_PAIR_COLUMNS = 128

# One launch multiplies with all experts as long as that takes less than one expert after the other, for which the host waits for the
# counts and then needs some 20 us per expert, a pass over its dequantized weights and a product of the matrix library, which is twice as fast
# as ours with many tokens (600 and 300 TFLOP/s on an H100). For experts of 28672 x 4096 both are even at some 360 tokens, for those of
# 1536 x 2048 at 2300. Not measured: reasoned from rates of single products.
MAX_EXPERT_TOKENS = 192
_EXPERT_PRODUCTS = 1 << 32
# What the kernel takes (kernels/cuda/experts.h).
_MOST_EXPERTS, _MOST_EXPERT_TOKENS = 1024, 1 << 20

_MOST_COLUMNS = 1 << 20
# Columns that two matrix instructions take: groups end with them.
_UNIT = 32


class CudaFragments(AllAtOnce):
    """Native CUDA kernels; see `kernels/cuda/`."""

    name = "cuda_fragments"

    def reject(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"runs on cuda, the weight is on {problem.device}"
        if problem.activation is not None:
            return (
                f"takes float activations, this weight asks for 8-bit ones ({problem.activation})"
            )
        if problem.bits not in fragments.BITS:
            return f"takes 2, 3, 4 and 8 bits, not {problem.bits}"
        if problem.has_codebook and problem.bits != 4:
            return f"takes codebooks of 4 bits, not {problem.bits}"
        if problem.has_g_idx:
            return "takes groups of neighbouring columns only, the weight has a g_idx"
        if problem.in_features % fragments.COLUMN_UNIT or problem.in_features >= _MOST_COLUMNS:
            return f"takes columns in multiples of {fragments.COLUMN_UNIT} below {_MOST_COLUMNS}, not {problem.in_features}"
        if problem.group_size % _UNIT and problem.group_size < problem.in_features:
            return f"takes group sizes that are multiples of {_UNIT}, not {problem.group_size}"
        return no_native_code()

    def prepare(self, tensor: Tensor, bits: int) -> Tensor:
        return to_fragments(tensor, bits)

    def restore(self, tensor: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        return fragments.from_fragments(tensor, shape, bits)

    def linear(
        self, x: Tensor, grid: PackedGrid, bias: Tensor | None, int8_activations: bool
    ) -> Tensor:
        tokens = x.reshape(-1, grid.in_features)
        arguments = (*self._operands(grid), bias, *_sizes(grid))
        # Wider activations keep their precision: the kernel would round them to 16 bits.
        if x.dtype.itemsize == 2 and _reads_directly(tokens, grid):
            y = call(torch.ops.hfq.cuda_linear, tokens.contiguous(), *arguments)
        else:
            y = torch.ops.hfq.cuda_linear_dequantized(tokens, *arguments)
        out: Tensor = y.view(*x.shape[:-1], grid.out_features)
        return out

    def all_experts(
        self, x: Tensor, counts: Tensor, grid: PackedGrid, bias: Tensor | None
    ) -> Tensor:
        y: Tensor = torch.ops.hfq.cuda_experts_linear(
            x, counts, *self._operands(grid), bias, *_sizes(grid)
        )
        return y

    def reads_counts_on_device(self, x: Tensor, tokens: int, grid: PackedGrid) -> bool:
        return x.dtype.itemsize == 2 and takes_all_experts(
            x, tokens, grid, most_expert_tokens(grid)
        )

    def stack(self, grids: Sequence[PackedGrid]) -> tuple[PackedGrid, list[PackedGrid]] | None:
        return stack_tiles(grids, fragments.ROWS, fragments.stack)

    def lookup(self, grid: PackedGrid, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows: Tensor = torch.ops.hfq.cuda_lookup(
            index.long(), *self._operands(grid), *_sizes(grid), native_dtype(dtype)
        )
        return rows.to(dtype)

    def dequantize(self, grid: PackedGrid, dtype: torch.dtype) -> Tensor:
        return fragments_weight(self._operands(grid), _sizes(grid), dtype)

    def _operands(self, grid: PackedGrid) -> tuple[Tensor | None, ...]:
        return (grid.qweight, grid.scales, grid.zeros, grid.codebook)


def max_direct_tokens(grid: PackedGrid | Fp8Grid, device: torch.device, dtype: torch.dtype) -> int:
    """Up to how many tokens of `dtype` a product is faster that reads the packed weight."""
    if grid.in_features * grid.out_features <= _SMALL or not _has_pairs(device):
        return _DIRECT_TOKENS
    if dtype == torch.float16 and grid.in_features % _PAIR_COLUMNS:
        return _DIRECT_TOKENS
    zeros = isinstance(grid, PackedGrid) and grid.zeros is not None
    through_floats = zeros or (dtype == torch.float16 and grid.scales.dtype != dtype)
    return _DIRECT_TOKENS_LARGE_FLOATS if through_floats else _DIRECT_TOKENS_LARGE


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_pairs(device: torch.device) -> bool:
    """As takes_wgmma in kernels/cuda/wgmma.cu, but that it does not know how the kernels were compiled."""
    return (
        torch.cuda.get_device_capability(device) == _WGMMA
        and os.environ.get(_WGMMA_VARIABLE) != "0"
    )


def _reads_directly(tokens: Tensor, grid: PackedGrid | Fp8Grid) -> bool:
    """(The device is asked only where it matters.)"""
    found = tokens.shape[0]
    return found <= _DIRECT_TOKENS or found <= max_direct_tokens(grid, tokens.device, tokens.dtype)


def takes_all_experts(x: Tensor, tokens: int, grid: Grid, each: int) -> bool:
    """Whether there is one launch for all experts.

    Args:
        x: whose device, dtype and gradient are those of the tokens.
        grid: with E in front of each tensor.
        each: tokens of an expert, on average, up to which that is faster than one expert after the other.
    """
    experts = grid.qweight.shape[0]
    learns = torch.is_grad_enabled() and x.requires_grad
    few = tokens <= min(each * experts, _MOST_EXPERT_TOKENS)
    return not learns and few and experts <= _MOST_EXPERTS


def most_expert_tokens(grid: Grid) -> int:
    """For kernels on tensor cores; see `MAX_EXPERT_TOKENS`."""
    return max(MAX_EXPERT_TOKENS, _EXPERT_PRODUCTS // (grid.in_features * grid.out_features))


def _sizes(grid: PackedGrid) -> tuple[int, int, int, int]:
    return (grid.bits, grid.group_size, grid.in_features, grid.out_features)
