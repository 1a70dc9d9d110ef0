"""`hfq.explain`: kernels and reasons."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfq import HfqConfig
from hfq.core.spec import IntSpec
from hfq.diagnose import explain
from hfq.kernels import dispatch
from hfq.nn.linear import QuantLinear


def packed(bits: int, in_features: int = 64) -> QuantLinear:
    linear = QuantLinear(
        in_features, 32, bias=False, format="int", spec=IntSpec(bits=bits, group_size=32)
    )
    generator = torch.Generator().manual_seed(bits)
    linear.requantize("weight", torch.randn(32, in_features, generator=generator))
    return linear


@pytest.fixture
def model():
    layers = [nn.ModuleDict({"up": packed(4), "down": packed(5)}) for _ in range(3)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(8, 8)})


def test_every_packed_weight_has_its_kernel(model):
    explanation = explain(model)
    assert [weight.name for weight in explanation.weights] == [
        f"layers.{i}.{name}" for i in range(3) for name in ("up", "down")
    ]
    for weight in explanation.weights:
        module = model.get_submodule(weight.name)
        choice = module.kernel_choice("weight")
        assert (weight.kernel, weight.refused) == (choice.row.name, choice.refused)
        assert weight.shape == (32, 64) and weight.group_size == 32 and weight.format == "int"
        assert weight.device == "cpu" and weight.kernel_mode == "auto"


def test_five_bits_name_who_refused(model):
    down = next(weight for weight in explain(model).weights if weight.name == "layers.0.down")
    assert down.kernel == dispatch.rows()[-1].name
    assert down.refused and all(reason for _, reason in down.refused)


def test_layers_share_a_row_and_reasons_stand_once(model):
    explanation = explain(model)
    lines = explanation.table().splitlines()
    assert sum("layers.*.up" in line for line in lines) == 1
    assert "  3  int" in next(line for line in lines if "layers.*.down" in line)
    for name, reason in explanation.weights[1].refused:
        assert " ".join(" ".join(lines).split()).count(f"not {name}: {reason}") == 1
    assert lines[-1] == "quantized 6 of 7 weights; kept 1 linear layers in float"
    assert max(map(len, lines)) <= 100


def test_one_module_and_none():
    assert explain(packed(4)).weights[0].name == "QuantLinear"
    nothing = explain(nn.ReLU())
    assert nothing.weights == () and nothing.table() == "quantized 0 of 0 weights"


def test_as_dict(model):
    found = json.loads(json.dumps(explain(model).to_dict()))
    assert found["weights"][1]["bits"] == 5 and found["summary"].startswith("quantized 6")


def test_the_summary_of_a_loaded_model_gives_reasons(tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HfqConfig(group_size=32)
    )
    summary = explain(model).summary
    assert summary.startswith("quantized 7 of 9 weights; kept 2: ")
    assert "output head (1)" in summary and "input embedding (1)" in summary
