"""Formats ``nf4`` and ``fp4``: the settings they take, the tensors they write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from hfq.core import affine
from hfq.core.codebooks import CODEBOOKS
from hfq.core.errors import ConfigError
from hfq.core.spec import CodebookSpec
from hfq.formats import FORMATS


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_codebook_is_a_format(name: str) -> None:
    assert FORMATS.get(name).spec({}) == CodebookSpec(codebook=name)
    spec = FORMATS.get(name).spec({"bits": 4, "sym": True, "group_size": 32, "double_quant": True})
    assert spec == CodebookSpec(codebook=name, group_size=32, double_quant=True)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_settings_that_a_codebook_does_not_have(name: str) -> None:
    codebook = FORMATS.get(name)
    with pytest.raises(ConfigError, match=f"format '{name}' has 4 bits, got bits=8"):
        codebook.spec({"bits": 8})
    with pytest.raises(ConfigError, match=f"format '{name}' has no zero points, got sym=False"):
        codebook.spec({"sym": False})
    with pytest.raises(ConfigError, match=f"format '{name}' has no setting 'act_order'"):
        codebook.spec({"act_order": True})


def test_the_tensors_of_double_quantization(random_weight: Callable[..., Tensor]) -> None:
    """scale = offset + code * step, rounded to scale_dtype."""
    spec = CodebookSpec(group_size=4, double_quant=True)
    weight = random_weight(40, 29)
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    tensors = FORMATS.get("nf4").pack(quantized)
    assert list(tensors) == ["weight", "weight_scale", "weight_scale_step", "weight_scale_offset"]
    assert tensors["weight_scale_step"].shape == (2,)  # 40 rows of 8 groups are 1.25 blocks of 256
    codes = tensors["weight_scale"].flatten().float()
    for position in (0, 255, 256, 319):
        block = position // 256
        step, offset = tensors["weight_scale_step"][block], tensors["weight_scale_offset"][block]
        expected = (offset + codes[position] * step).half()
        assert quantized.scales.flatten()[position] == expected
