"""Packed modules with random weights, copies of them, and what their state dicts hold."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hfq.core.spec import IntSpec, QuantSpec
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear

FOUR_BITS = IntSpec(group_size=16)


def quantized(
    generator: torch.Generator,
    *,
    format: str = "int",
    spec: QuantSpec = FOUR_BITS,
    rows: int = 24,
    columns: int = 32,
) -> QuantLinear:
    packed = QuantLinear(columns, rows, format=format, spec=spec)
    packed.requantize("weight", torch.randn(rows, columns, generator=generator))
    packed.bias.data.copy_(torch.randn(rows, generator=generator))
    packed.kernel_mode = "exact"
    return packed.eval()


def tied(generator: torch.Generator, spec: QuantSpec = FOUR_BITS) -> nn.ModuleDict:
    """An output head and the embedding that shares its table."""
    head = QuantLinear(32, 40, bias=False, format="int", spec=spec)
    head.requantize("weight", torch.randn(40, 32, generator=generator))
    table = QuantEmbedding(40, 32, format="int", spec=spec)
    table.share_packed(head)
    return nn.ModuleDict({"table": table, "head": head}).eval()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False),
}


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
