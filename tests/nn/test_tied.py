"""An output head and an embedding that share one packed table stay tied, whatever is done to either."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from hfq.core.errors import WeightError
from hfq.core.spec import CodebookSpec, IntSpec
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear

from .packed_modules import COPIES, saved, snapshot, tied


def check_tied(model: nn.ModuleDict, weight: Tensor) -> None:
    table, head = model["table"], model["head"]
    table(torch.tensor(0))
    assert table.qweight is head.qweight and table.weight_scale is head.weight_scale
    assert len(list(model.parameters())) == 2
    ids, x = torch.tensor([[0, 39], [17, 0]]), torch.eye(32, dtype=weight.dtype)
    assert torch.equal(table(ids), weight[ids])
    torch.testing.assert_close(head(x).T, weight)
    assert table.kernel("weight") is head.kernel("weight")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tied_weights_stay_tied(bits: int, generator: torch.Generator) -> None:
    model = tied(generator, IntSpec(bits=bits, group_size=16))
    weight = model["head"].dequantize()
    check_tied(model, weight)
    for duplicate in COPIES.values():
        check_tied(duplicate(model), weight)
    for module in (model, model["table"], model["head"]):
        module.to("cpu").double().float()
        check_tied(model, weight)
    model.share_memory()
    check_tied(model, weight)


@pytest.mark.parametrize("order", [("table", "head"), ("head", "table")])
def test_tied_weights_survive_meta(order: tuple[str, str], generator: torch.Generator) -> None:
    model = tied(generator)
    weight, state = model["head"].dequantize(), snapshot(model)
    model = nn.ModuleDict({name: model[name] for name in order})
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    check_tied(model, weight)
    model.to("meta")
    model.load_state_dict(state, assign=True)
    check_tied(model, weight)


@pytest.mark.parametrize("prepared", [True, False])
def test_tied_weights_are_saved_once(prepared: bool, generator: torch.Generator) -> None:
    model = tied(generator)
    model["head"].prepare() if prepared else model["head"].restore()
    state = model.state_dict()
    for name in ("qweight", "weight_scale"):
        pointers = {
            state[f"{module}.{name}"].untyped_storage().data_ptr() for module in ("table", "head")
        }
        assert len(pointers) == 1
    twin = tied(generator)
    twin.load_state_dict(torch.load(io.BytesIO(saved(state))))
    check_tied(twin, model["head"].dequantize())


@pytest.mark.parametrize("name", ["table", "head"])
def test_writing_to_either_of_tied_weights_writes_to_both(
    name: str, generator: torch.Generator
) -> None:
    model = tied(generator, IntSpec(group_size=1, scale_dtype="float32"))
    value = torch.randn(40, 32, generator=generator)
    model[name].weight = value
    check_tied(model, value)
    model[name].weight.data += 1
    check_tied(model, value + 1)
    model["table"].weight = model["head"].weight
    check_tied(model, value + 1)


def test_unequal_slots_are_not_shared() -> None:
    head = QuantLinear(32, 40, format="int", spec=IntSpec(group_size=16))
    for other in (
        QuantEmbedding(40, 32, format="int", spec=IntSpec(group_size=32)),
        QuantEmbedding(41, 32, format="int", spec=IntSpec(group_size=16)),
        QuantEmbedding(40, 32, format="nf4", spec=CodebookSpec(group_size=16)),
    ):
        with pytest.raises(WeightError, match="equal slots"):
            other.share_packed(head)
