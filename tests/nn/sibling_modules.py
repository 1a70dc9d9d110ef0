"""Modules that read one input, and what each of them gives alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hfq.core.spec import IntSpec, QuantSpec
from hfq.nn import siblings
from hfq.nn.linear import QuantLinear

SPEC = IntSpec(group_size=32)
SIZES = {"q": 48, "k": 16, "v": 32}
COLUMNS = 64


class Block(nn.Module):
    """Modules that all read x, one after the other."""

    def __init__(
        self,
        generator: torch.Generator,
        format: str = "int",
        spec: QuantSpec = SPEC,
        bias: bool = False,
        sizes: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        for name, rows in (sizes or SIZES).items():
            linear = nn.Linear(COLUMNS, rows, bias=bias, dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.add_module(name, QuantLinear.from_linear(linear, format=format, spec=spec))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.children()], -1)


def group_of(module: nn.Module) -> siblings.Group | None:
    assert isinstance(module, QuantLinear)
    return module.operands("weight").siblings.group


def tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, count, COLUMNS, generator=generator).bfloat16()


def learnt(block: Block, generator: torch.Generator) -> Block:
    """After a second input it is known who saw the first."""
    for _ in range(2):
        block(tokens(1, generator))
    return block


def alone(block: Block, x: Tensor) -> Tensor:
    """What the modules give one by one: each sees a copy of x, and their group is not asked."""
    outputs = []
    for module in block.children():
        assert isinstance(module, QuantLinear)
        operands = module.operands("weight")
        mode = module.int8_activations(x)
        outputs.append(operands.choice.row.linear(x, operands.grid, module.bias, mode))
    return torch.cat(outputs, -1)
