"""Formats ``int`` and ``int8``: the settings they take, the tensors they write."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hfq.core.errors import CheckpointError, ConfigError
from hfq.core.spec import Int8Spec, IntSpec
from hfq.core.weight import QuantizedWeight
from hfq.formats import FORMATS


def test_defaults() -> None:
    assert FORMATS.get("int").spec({}) == IntSpec()
    assert FORMATS.get("int8").spec({"bits": None}) == Int8Spec()


@pytest.mark.parametrize("name", ["int", "int8"])
def test_a_setting_of_another_format_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"format '{name}' has no setting 'double_quant'"):
        FORMATS.get(name).spec({"double_quant": True})


def test_zero_points_are_stored_only_where_the_grid_has_them() -> None:
    integers = FORMATS.get("int")
    assert list(integers.layout(IntSpec(), 2, 4)) == ["weight", "weight_scale"]
    asymmetric = integers.layout(IntSpec(sym=False), 2, 4)
    assert list(asymmetric) == ["weight", "weight_scale", "weight_zero"]


def test_the_layout_of_the_module(generator: torch.Generator) -> None:
    """Codes of 3 bits in one stream per row, a scale per group of 4, a short last group."""
    spec = IntSpec(bits=3, group_size=4)
    weight = QuantizedWeight(
        spec=spec,
        codes=torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 2.0]]).half(),
    )
    tensors = FORMATS.get("int").pack(weight)
    stream = 1 | 2 << 3 | 3 << 6 | 4 << 9 | 5 << 12
    assert tensors["weight"].tolist() == [[[stream & 255], [stream >> 8]]]
    assert tensors["weight_scale"].tolist() == [[0.5, 2.0]]
    assert weight.dequantize().tolist() == [[-1.5, -1.0, -0.5, 0.0, 2.0]]


def test_groups_of_scattered_columns(generator: torch.Generator) -> None:
    """With ``g_idx`` each column names its group."""
    integers, spec = FORMATS.get("int"), IntSpec(group_size=4, static_groups=False)
    weight = QuantizedWeight(
        spec=spec,
        codes=torch.randint(0, 16, (3, 8), generator=generator, dtype=torch.uint8),
        scales=torch.rand(3, 2, generator=generator).half(),
        g_idx=torch.tensor([0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.int32),
    )
    tensors = integers.pack(weight)
    assert tensors["weight_g_idx"].dtype == torch.int32
    assert torch.equal(integers.unpack(tensors, spec, 8).dequantize(), weight.dequantize())
    assert integers.grid(tensors, spec, 3, 8).g_idx is tensors["weight_g_idx"]
    integers.check_values(tensors, 8)
    neighbours = integers.pack(replace(weight, g_idx=None))
    assert neighbours["weight_g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for wrong in (-1, 2):
        tensors["weight_g_idx"][3] = wrong
        with pytest.raises(CheckpointError, match="groups from 0 to 1"):
            integers.check_values(tensors, 8)
