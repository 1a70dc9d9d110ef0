"""Checkpoints of format version 1 stay readable: golden files, written once and never again.

See `tests/golden/make.py`. A failure here means that published checkpoints would be read differently: keep the
old layout readable and raise `FORMAT_VERSION` for the new one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hfq.core.spec import QuantSpec
from hfq.formats import FORMAT_VERSION, FORMATS, check_tensors
from hfq.kernels import dispatch

FOLDER = Path(__file__).parent.parent / "golden"
INDEX: dict[str, dict[str, Any]] = json.loads((FOLDER / "golden.json").read_text())


@pytest.fixture(params=INDEX)
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """The tensors of one file."""
    return load_file(FOLDER / f"{request.param}.safetensors")


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the index says of the file of `golden`."""
    return INDEX[request.node.callspec.params["golden"]]


@pytest.fixture
def spec(entry: dict[str, Any]) -> QuantSpec:
    return FORMATS.get(entry["format"]).spec(entry["settings"])


def stored(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in golden.items() if key.startswith("weight")}


def test_every_file_is_of_a_version_that_is_read(
    golden: dict[str, Tensor], entry: dict[str, Any], spec: QuantSpec
) -> None:
    assert entry["format_version"] <= FORMAT_VERSION
    layout = FORMATS.get(entry["format"]).layout(spec, entry["out_features"], entry["in_features"])
    assert stored(golden).keys() == layout.keys()
    check_tensors("golden", golden, layout)


def test_files_are_read_to_the_same_values(
    golden: dict[str, Tensor], entry: dict[str, Any], spec: QuantSpec
) -> None:
    weight = FORMATS.get(entry["format"]).unpack(stored(golden), spec, entry["in_features"])
    assert torch.equal(weight.codes, golden["codes"])
    assert torch.equal(weight.dequantize(), golden["values"])


def test_kernels_read_the_same_values(
    golden: dict[str, Tensor], entry: dict[str, Any], spec: QuantSpec
) -> None:
    sizes = (entry["out_features"], entry["in_features"])
    grid = FORMATS.get(entry["format"]).grid(stored(golden), spec, *sizes)
    weight = dispatch.rows(type(grid))[-1].dequantize(grid, torch.float32)
    assert torch.equal(weight, golden["values"])


def test_the_same_codes_are_written_as_the_same_bytes(
    golden: dict[str, Tensor], entry: dict[str, Any], spec: QuantSpec
) -> None:
    packed_format = FORMATS.get(entry["format"])
    weight = replace(
        packed_format.unpack(stored(golden), spec, entry["in_features"]), codes=golden["codes"]
    )
    again = packed_format.pack(weight)
    assert again.keys() == stored(golden).keys()
    for key, tensor in again.items():
        assert tensor.dtype == golden[key].dtype
        assert torch.equal(tensor.view(torch.uint8), golden[key].view(torch.uint8))


def test_every_registered_format_has_a_golden_file() -> None:
    assert {entry["format"] for entry in INDEX.values()} == set(FORMATS.names())
