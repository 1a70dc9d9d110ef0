"""The value of codes, against the formula written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core.codebooks import CODEBOOKS
from hfq.core.spec import CodebookSpec, IntSpec
from hfq.core.weight import PackedGrid, QuantizedWeight, expand_groups


@pytest.mark.parametrize(("columns", "group_size"), [(6, 2), (7, 3), (5, 8), (5, -1), (1, 1)])
def test_expand_groups_repeats_along_columns(columns: int, group_size: int) -> None:
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    per_group = torch.arange(2.0 * groups).reshape(2, groups)
    expected = [[row[k // size].item() for k in range(columns)] for row in per_group]
    assert expand_groups(per_group, group_size, columns).tolist() == expected


def test_expand_groups_by_index() -> None:
    per_group = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    g_idx = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    assert expand_groups(per_group, 2, 4, g_idx).tolist() == [[20, 10, 10, 20], [40, 30, 30, 40]]


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "g_idx", "nf4"])
def test_dequantize_is_the_formula(kind: str, generator: torch.Generator) -> None:
    codes = torch.randint(0, 16, (3, 6), generator=generator, dtype=torch.uint8)
    scales = torch.randn(3, 2, generator=generator).half()
    zeros = torch.randn(3, 2, generator=generator).half() if kind == "asymmetric" else None
    g_idx = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.int32) if kind == "g_idx" else None
    spec = CodebookSpec(group_size=4) if kind == "nf4" else IntSpec(group_size=4, sym=zeros is None)
    weight = QuantizedWeight(spec=spec, codes=codes, scales=scales, zeros=zeros, g_idx=g_idx)
    values = weight.dequantize()
    assert values.dtype == torch.float32
    for n in range(3):
        for k in range(6):
            group = k // 4 if g_idx is None else int(g_idx[k])
            code, scale = int(codes[n, k]), scales[n, group].float()
            zero = torch.tensor(8.0) if zeros is None else zeros[n, group].float()
            unit = torch.tensor(CODEBOOKS["nf4"][code]) if kind == "nf4" else code - zero
            assert values[n, k] == unit * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_cast_once(
    dtype: torch.dtype, random_weight: Callable[..., Tensor]
) -> None:
    codes = (random_weight(2, 8, size=3.0) + 8).clamp(0, 15).to(torch.uint8)
    weight = QuantizedWeight(spec=IntSpec(), codes=codes, scales=torch.rand(2, 1).half())
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


def test_expert_takes_one_slice_of_every_tensor(generator: torch.Generator) -> None:
    stack = PackedGrid(
        qweight=torch.randint(0, 256, (3, 4, 2, 1), generator=generator, dtype=torch.uint8),
        scales=torch.rand(3, 4, 1, generator=generator),
        zeros=torch.rand(3, 4, 1, generator=generator),
        codebook=None,
        g_idx=None,
        bits=4,
        group_size=4,
        in_features=4,
        out_features=4,
    )
    one = stack.expert(2)
    assert stack.zeros is not None and one.zeros is not None
    assert torch.equal(one.qweight, stack.qweight[2])
    assert torch.equal(one.scales, stack.scales[2]) and torch.equal(one.zeros, stack.zeros[2])
    assert (one.bits, one.in_features) == (4, 4)
