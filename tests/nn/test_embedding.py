"""QuantEmbedding: rows of the dequantized table, alone and tied to a Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfq.core.spec import IntSpec, QuantSpec
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear
from hfq.nn.virtual_weight import VirtualWeight


def table_of(
    rows: int,
    columns: int,
    generator: torch.Generator,
    format: str = "int",
    spec: QuantSpec = IntSpec(),  # noqa: B008
) -> QuantEmbedding:
    table = QuantEmbedding(rows, columns, format=format, spec=spec)
    table.requantize("weight", torch.randn(rows, columns, generator=generator))
    return table


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 13), (64, 96)])
@pytest.mark.parametrize("with_head", [False, True])
def test_rows_of_every_format(
    rows: int,
    columns: int,
    with_head: bool,
    format_and_spec: tuple[str, QuantSpec],
    generator: torch.Generator,
) -> None:
    format, spec = format_and_spec
    table = table_of(rows, columns, generator, format, spec)
    weight = table.dequantize()
    if with_head:
        head = QuantLinear(columns, rows, bias=False, format=format, spec=spec)
        head.set_packed("weight", table.neutral_tensors("weight"))
        table.share_packed(head)
        assert table.kernel("weight") is head.kernel("weight")
    for shape in ((), (3,), (2, 5), (2, 0), (1, 2, 3)):
        ids = torch.randint(0, rows, shape, generator=generator)
        out = table(ids)
        assert out.shape == (*shape, columns) and not out.requires_grad
        assert torch.equal(out, weight[ids])
    assert torch.equal(table(torch.tensor([rows - 1, 0], dtype=torch.int32)), weight[[rows - 1, 0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_have_the_dtype_of_the_module(dtype: torch.dtype, generator: torch.Generator) -> None:
    table = table_of(37, 32, generator).to(dtype)
    ids = torch.randint(0, 37, (4,), generator=generator)
    assert table(ids).dtype == dtype and torch.equal(table(ids), table.dequantize()[ids])


@pytest.mark.parametrize("ids", [[-1], [0, 37], [40], [1000]])
@pytest.mark.parametrize("with_head", [False, True])
def test_ids_outside_of_the_table_are_refused(
    ids: list[int], with_head: bool, generator: torch.Generator
) -> None:
    table = table_of(37, 32, generator)
    if with_head:
        head = QuantLinear(32, 37, bias=False, format="int", spec=IntSpec())
        head.set_packed("weight", table.neutral_tensors("weight"))
        table.share_packed(head)
    with pytest.raises(IndexError, match="0 to 36"):
        table(torch.tensor(ids))


def test_from_embedding(generator: torch.Generator) -> None:
    embedding = nn.Embedding(37, 32, padding_idx=3, dtype=torch.bfloat16).eval()
    table = QuantEmbedding.from_embedding(
        embedding, format="int", spec=IntSpec(bits=8, group_size=32)
    )
    assert isinstance(table, nn.Embedding) and not table.training
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (37, 32, 3)
    assert (table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse) == (
        None,
        2.0,
        False,
        False,
    )
    assert isinstance(table.weight, VirtualWeight) and table.weight.dtype == torch.bfloat16
    assert torch.equal(table(torch.tensor([3])), torch.zeros(1, 32, dtype=torch.bfloat16))
    error = (table.dequantize() - embedding.weight).abs().max()
    assert error <= embedding.weight.abs().max() / 100
    assert repr(table) == "QuantEmbedding(37, 32, format=int, bits=8, group_size=32)"


def test_writing_to_the_table(generator: torch.Generator) -> None:
    table = table_of(37, 32, generator, spec=IntSpec(group_size=1, scale_dtype="float32"))
    value = torch.randn(37, 32, generator=generator)
    table.weight = value
    table.weight.data[5] = 0
    value[5] = 0
    assert torch.equal(table(torch.arange(37)), value)
