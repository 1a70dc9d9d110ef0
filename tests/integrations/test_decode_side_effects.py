"""Native code for a decode step changes nothing else: hooks, attention weights, gradients, copies, classes, compilers."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfq.integrations import decode
from hfq.kernels import native

from .decode_models import CALLS, assert_same, counted, generate, prompt

pytestmark = pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels")


def test_recorded_hidden_states_and_hooks(
    llama: PreTrainedModel, native_calls: dict[str, int]
) -> None:
    expected = generate(llama, 6, output_hidden_states=True)
    decode.install(llama)
    found = generate(llama, 6, output_hidden_states=True)
    # Attention is told of the wish, and leaves what it does not know to the model's own code.
    assert counted(native_calls) == CALLS | {"attention": 0}
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    layer: Any = llama.get_submodule("model.layers.1")
    seen: list[str] = []
    for name in ("self_attn", "self_attn.k_proj", "mlp.down_proj", "input_layernorm"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    generate(llama, 6, max_new_tokens=2, min_new_tokens=2)
    assert len(seen) == 8 and len(set(seen)) == 4
    assert counted(native_calls) == {"norm": 2 * 5, "gate": 2 * 2, "attention": 2}


def test_attention_weights_come_from_the_models_own_code(
    llama: PreTrainedModel, native_calls: dict[str, int]
) -> None:
    decode.install(llama)
    generate(llama, 6)
    assert counted(native_calls) == CALLS
    llama.set_attn_implementation("eager")
    for asked in (False, True):
        found = generate(llama, 6, output_attentions=asked)
        assert counted(native_calls) == CALLS | {"attention": 0}
    decode.remove(llama)
    expected = generate(llama, 6, output_attentions=True)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Transformers 5.23 has another name for it.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradients_and_training(llama: PreTrainedModel, native_calls: dict[str, int]) -> None:
    def gradients() -> list[Tensor]:
        batch = prompt(9)
        llama.zero_grad()
        llama(**batch, labels=batch["input_ids"]).loss.backward()
        return [each.grad.clone() for each in llama.parameters() if each.grad is not None]

    expected = gradients()
    decode.install(llama)
    generate(llama, 9)
    assert counted(native_calls) == CALLS
    found = [gradients(), llama.train() and gradients()]
    # A reentrant checkpoint runs without gradients first.
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    llama.enable_input_require_grads()
    found.append(gradients())
    for each in found:
        assert all(map(torch.equal, each, expected)) and len(each) == len(expected)
    assert not any(counted(native_calls).values())


def test_copies_and_pickles(
    llama: PreTrainedModel, tmp_path: Path, native_calls: dict[str, int]
) -> None:
    decode.install(llama)
    expected = generate(llama, 7)
    stored = io.BytesIO()
    torch.save(llama, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(llama),
        pickle.loads(pickle.dumps(llama)),
        torch.load(stored, weights_only=False),
    ):
        kinds = [type(module) for module in other.modules()]
        assert kinds == [type(module) for module in llama.modules()]
        counted(native_calls)
        assert_same(generate(other, 7), expected)
        assert counted(native_calls) == CALLS
        # A copy has its own weights.
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert_same(generate(llama, 7), expected)
    llama.save_pretrained(tmp_path)
    names = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().keys()
    assert names == llama.state_dict().keys()


def test_names_of_classes_stay(llama: PreTrainedModel) -> None:
    before = [type(module) for module in llama.modules()]
    decode.install(llama)
    for module, plain in zip(llama.modules(), before, strict=True):
        assert isinstance(module, plain)
        assert (type(module).__name__, type(module).__module__) == (
            plain.__name__,
            plain.__module__,
        )
    kinds = [type(module) for module in llama.modules()]
    assert sum(kind is not plain for kind, plain in zip(kinds, before, strict=True)) == 5 + 2 + 2
    # Once more changes nothing.
    decode.install(llama)
    assert [type(module) for module in llama.modules()] == kinds


def test_a_compiler_sees_the_models_own_code(
    llama: PreTrainedModel, native_calls: dict[str, int]
) -> None:
    decode.install(llama)
    before = dict(native_calls)
    compiled: Any = torch.compile(llama.model.layers[0].mlp, backend="eager", fullgraph=True)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = compiled(x)
        assert native_calls == before
        torch.testing.assert_close(llama.model.layers[0].mlp(x), found)
    assert native_calls == before | {"gate": before["gate"] + 1}
