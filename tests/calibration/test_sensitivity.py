"""What bits are predicted to cost, beside what they do cost: the divergence of the trained model's predictions."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hfq import CalibrationError, HfqConfig
from hfq.algorithms import ALGORITHMS
from hfq.calibration.run import Calibration
from hfq.calibration.sensitivity import Sensitivity
from hfq.core.spec import IntSpec
from hfq.integrations.selection import select_modules

MODEL = Path(__file__).parents[2] / "examples" / "stdlib-llama"
CONFIG = HfqConfig("rtn", group_size=64)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    text = (MODEL / "heldout.txt").read_text()[:20000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(text).input_ids)
    return list(ids[:2048].split(256))


def measuring(model: PreTrainedModel, sequences: list[Tensor], **chosen: bool) -> Sensitivity:
    run = Calibration(model, select_modules(model, CONFIG).recipes, _no_twin, None)
    may_choose = lambda name: chosen.get(name.rpartition(".")[2], not chosen)  # noqa: E731
    return Sensitivity(run, sequences, (2, 4), may_choose, lambda index: nullcontext(), {})


def _no_twin(*args: object) -> None:
    raise AssertionError("nothing is to be replaced")


def log_likelihoods(model: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return model(torch.stack(sequences), use_cache=False).logits.log_softmax(-1)


def test_the_prediction_is_what_the_whole_model_shows(
    model: PreTrainedModel, sequences: list[Tensor]
) -> None:
    expected = log_likelihoods(model, sequences)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sensitivity = measuring(model, sequences, q_proj=True, k_proj=True, v_proj=True, down_proj=True)
    sensitivity.gradients(seed=0)
    groups = [group for index in range(3) for group in sensitivity.block(index)]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    prefixes = [(f"model.layers.{n}.self_attn.", f"model.layers.{n}.mlp.") for n in range(3)]
    assert [group.names for group in groups] == [
        names
        for attention, mlp in prefixes
        for names in (tuple(f"{attention}{x}_proj" for x in "qkv"), (f"{mlp}down_proj",))
    ]
    for group in (groups[0], groups[1], groups[5]):
        weights = {name: model.get_submodule(name).weight for name in group.names}
        assert group.weights == sum(weight.numel() for weight in weights.values())
        for bits in (2, 4):
            for weight in weights.values():
                rounded = ALGORITHMS.get("rtn").quantize(
                    weight.detach(),
                    IntSpec(bits=bits, group_size=64),
                    ALGORITHMS.get("rtn").options,
                )
                weight.data = rounded.dequantize()
            found = log_likelihoods(model, sequences)
            kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
            for name, weight in weights.items():
                weight.data = before[f"{name}.weight"]
            # One label is drawn for each of 2048 tokens; at 2 bits the error is no longer small.
            assert group.costs[bits] == pytest.approx(kl, rel=0.25 if bits == 4 else 0.5)
            assert group.bytes[bits] == group.weights * bits / 8 + group.weights / 64 * 2


def test_seeds_decide(model: PreTrainedModel, sequences: list[Tensor]) -> None:
    def costs(seed: int) -> list[float]:
        sensitivity = measuring(model, sequences[:2], o_proj=True)
        sensitivity.gradients(seed)
        return [cost for group in sensitivity.block(0) for cost in group.costs.values()]

    assert costs(0) == costs(0) != costs(1)


def test_damaged_activations_are_no_measurement(
    model: PreTrainedModel, sequences: list[Tensor]
) -> None:
    norm = model.model.norm.weight
    before = norm.data
    norm.data = torch.full_like(before, torch.nan)
    sensitivity = measuring(model, sequences[:1])
    with pytest.raises(CalibrationError, match="NaN or infinite logits"):
        sensitivity.gradients(0)
    norm.data = before
