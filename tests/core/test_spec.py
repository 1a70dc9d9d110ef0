"""Specs: defaults, derived numbers, and a refusal of everything that makes no sense."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hfq.core.errors import ConfigError
from hfq.core.spec import CodebookSpec, Int8Spec, IntSpec, group_count


@pytest.mark.parametrize(
    ("columns", "group_size", "groups"),
    [(256, 128, 2), (257, 128, 3), (5, 128, 1), (128, 128, 1), (1, 1, 1), (7, 1, 7), (300, -1, 1)],
)
def test_group_count(columns: int, group_size: int, groups: int) -> None:
    assert group_count(columns, group_size) == groups


def test_defaults() -> None:
    assert IntSpec() == IntSpec(bits=4, group_size=128, sym=True, scale_dtype="float16")
    assert CodebookSpec() == CodebookSpec(codebook="nf4", group_size=64, double_quant=False)
    assert Int8Spec().scale_dtype == "float32" and Int8Spec().levels == 256


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_and_the_implied_zero(bits: int) -> None:
    spec = IntSpec(bits=bits)
    assert spec.levels == 2**bits and spec.implied_zero == 2 ** (bits - 1)


def test_scale_dtypes() -> None:
    for name in ("float16", "bfloat16", "float32"):
        assert IntSpec(scale_dtype=name).torch_scale_dtype == getattr(torch, name)
        assert CodebookSpec(scale_dtype=name).torch_scale_dtype == getattr(torch, name)


def test_specs_are_values() -> None:
    assert hash(IntSpec()) == hash(IntSpec()) and IntSpec() != IntSpec(bits=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        IntSpec().bits = 3  # type: ignore[misc]


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", None, True])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(ConfigError, match="bits must be an integer from 2 to 8, got"):
        IntSpec(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [IntSpec, CodebookSpec])
@pytest.mark.parametrize("group_size", [0, -2, 1.5, "128", None, True])
def test_group_size_out_of_range(spec: type[IntSpec], group_size: object) -> None:
    with pytest.raises(ConfigError, match="group_size must be a positive integer, or -1"):
        spec(group_size=group_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [IntSpec, CodebookSpec])
@pytest.mark.parametrize("dtype", ["float64", "half", torch.float16, None])
def test_unknown_scale_dtype(spec: type[IntSpec], dtype: object) -> None:
    with pytest.raises(ConfigError, match="scale_dtype must be one of float16, bfloat16, float32"):
        spec(scale_dtype=dtype)  # type: ignore[arg-type]


def test_a_near_scale_dtype_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'bfloat16'\?"):
        IntSpec(scale_dtype="bfloat")


@pytest.mark.parametrize("flag", [1, "yes", None])
def test_flags_are_booleans(flag: object) -> None:
    with pytest.raises(ConfigError, match="sym must be True or False"):
        IntSpec(sym=flag)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="double_quant must be True or False"):
        CodebookSpec(double_quant=flag)  # type: ignore[arg-type]


def test_an_unknown_codebook_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown codebook 'nf5'.*Did you mean 'nf4'\?"):
        CodebookSpec(codebook="nf5")


@pytest.mark.parametrize(
    "setting", [{"bits": 4}, {"group_size": 64}, {"sym": False}, {"scale_dtype": "float16"}]
)
def test_int8_has_no_choices(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="use format 'int' for other settings"):
        Int8Spec(**setting)  # type: ignore[arg-type]
