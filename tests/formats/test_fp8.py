"""Format ``fp8``: the settings it takes, the tensors it writes, the weights it rounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.errors import CheckpointError, ConfigError, WeightError
from hfq.core.spec import Fp8Spec
from hfq.core.weight import QuantizedWeight
from hfq.formats import FORMATS

FP8 = FORMATS.get("fp8")


def rounded(weight: Tensor) -> QuantizedWeight:
    return affine.encode(weight, *affine.range_grid(weight, Fp8Spec()), Fp8Spec())


def test_settings() -> None:
    assert FP8.spec({}) == Fp8Spec()
    given = {"bits": 8, "group_size": -1, "sym": True, "scale_dtype": "float32"}
    assert FP8.spec({**given, "activation": "dynamic"}) == Fp8Spec(activation="dynamic")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("bits", 4), ("group_size", 128), ("sym", False), ("scale_dtype", "float16")],
)
def test_settings_that_it_does_not_have(name: str, wrong: object) -> None:
    with pytest.raises(ConfigError, match=f"got {name}={wrong!r}: expected .*use format 'int'"):
        FP8.spec({name: wrong})


def test_names_that_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="format 'fp8' has no setting 'double_quant'"):
        FP8.spec({"double_quant": True})
    with pytest.raises(ConfigError, match="activation must be None or one of dynamic, static"):
        FP8.spec({"activation": "int8"})


def test_the_layout_of_the_module() -> None:
    """1.0 has exponent 7 and mantissa 0, 448 is s1111110, the sign is the upper bit."""
    weight = rounded(torch.tensor([[448.0, 1.0, -1.0, 1.125, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]))
    tensors = FP8.pack(weight)
    assert list(tensors) == ["weight", "weight_scale"]
    assert tensors["weight"].shape == (2, 5, 1) and tensors["weight"].dtype == torch.uint8
    assert tensors["weight"][0].flatten().tolist() == [0x7E, 0x38, 0xB8, 0x39, 0]
    assert tensors["weight_scale"].tolist() == [[1.0], [0.0]]
    assert list(FP8.layout(Fp8Spec(activation="static"), 2, 5))[-1] == "weight_input_scale"


def test_the_error_is_at_most_a_sixteenth_of_each_weight(
    random_weight: Callable[..., Tensor],
) -> None:
    weight = random_weight(20, 300)
    found = rounded(weight)
    error, least = (found.dequantize() - weight).abs(), found.scales * 2.0**-10
    assert bool((error <= torch.maximum(weight.abs() / 16, least) * 1.000001).all())
    largest = weight.abs().argmax(1)
    rows = torch.arange(20)
    torch.testing.assert_close(found.dequantize()[rows, largest], weight[rows, largest])


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_weights_are_numbers(
    size: float, random_weight: Callable[..., Tensor]
) -> None:
    weight = random_weight(3, 40).clamp(-0.05, 0.05) * 20 * size
    found = rounded(weight).dequantize()
    assert bool(found.isfinite().all())
    assert bool(((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 16).all()) or (
        size == 1e-38 and not found.any()
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_numbers_are_refused(value: str, random_weight: Callable[..., Tensor]) -> None:
    weight = random_weight(3, 40)
    weight[1, 7] = float(value)
    with pytest.raises(WeightError, match="expected finite weights"):
        rounded(weight)


@pytest.mark.parametrize("code", [127, 255])
def test_nan_in_a_checkpoint_is_damage(code: int, random_weight: Callable[..., Tensor]) -> None:
    tensors = FP8.pack(rounded(random_weight(3, 40)))
    FP8.check_values(tensors, 40)
    tensors["weight"][2, 5] = code
    with pytest.raises(CheckpointError, match=r"got NaN .*damaged"):
        FP8.check_values(tensors, 40)
