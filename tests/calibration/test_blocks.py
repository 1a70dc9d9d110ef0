"""Finding the blocks of a model and running them one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hfq.calibration.blocks import find_blocks, record_calls, run_after_blocks, run_block
from hfq.core.errors import CalibrationError

from ..integrations.tiny_models import CONFIGS, build

IDS = torch.arange(34).view(2, 17)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_block_by_block_is_the_model(kind: str) -> None:
    model = build(kind)
    blocks = find_blocks(model)
    assert len(blocks) == 2 and all(model.get_submodule(name) is m for name, m in blocks.items())
    with torch.no_grad():
        expected = model(IDS).logits
    hidden, calls = record_calls(model, list(blocks.values()), IDS)
    for block, call in zip(blocks.values(), calls, strict=True):
        hidden = run_block(block, hidden, call)
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    run_after_blocks(model, list(blocks.values()), IDS, hidden)
    handle.remove()
    assert torch.equal(seen[0], expected)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected), "the model was left changed"


def test_a_forward_that_hooks_have_set_comes_back() -> None:
    model = build("llama")
    blocks = list(find_blocks(model).values())

    def hooked(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError

    vars(blocks[0])["forward"] = hooked
    record_calls(model, blocks, IDS)
    assert vars(blocks[0])["forward"] is hooked and "forward" not in vars(blocks[1])


def test_models_without_blocks_in_a_row_are_refused() -> None:
    with pytest.raises(CalibrationError, match="Linear has no list of blocks"):
        find_blocks(nn.Linear(2, 2))

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            x = torch.ones(1, 3)
            for layer in self.order():
                x = layer(x)
            return x

        def order(self) -> list[nn.Module]:
            return list(self.layers)[::-1]

    model = Backwards()
    with pytest.raises(CalibrationError, match="expected block 0 to run next, but block 2 did"):
        record_calls(model, list(find_blocks(model).values()), IDS)
    model.order = lambda: list(model.layers)[:2]  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match="expected all of 3 blocks to run, but 2 did"):
        record_calls(model, list(find_blocks(model).values()), IDS)
