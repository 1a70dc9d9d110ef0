"""Every PEFT method on a packed base: inject, train, save, reload, merge; nothing is asked of the user.

Where equality is asked, the base is packed with one group per weight and float32 scales, which loses nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hfq.core.spec import IntSpec
from hfq.nn.linear import QuantLinear
from hfq.training.merge import merge_to_float

FOUR_BITS = IntSpec(group_size=16)
LOSSLESS = IntSpec(group_size=1, scale_dtype="float32")

pytestmark = [
    # PEFT's remarks on its own methods.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor.*invalid shape"),
    pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate for .IA.:UserWarning"),
    # PEFT uses names that Transformers 5.23 renames.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # SHiRA uses sparse tensors, and torch warns about not checking them.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

LINEARS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SOME = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}

METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, **LINEARS),
    "LoRA, random B": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **LINEARS),
    "LoRA with bias": lambda: peft.LoraConfig(r=4, lora_bias=True, **LINEARS),
    "LoRA, orthogonal": lambda: peft.LoraConfig(r=4, init_lora_weights="orthogonal", **LINEARS),
    "rsLoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, **LINEARS),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **LINEARS),
    "PiSSA": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **LINEARS),
    "OLoRA": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **LINEARS),
    "MiCA": lambda: peft.LoraConfig(r=4, init_lora_weights="mica", **LINEARS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **LINEARS),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, **LINEARS),
    "LoKr": lambda: peft.LoKrConfig(r=4, **LINEARS),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, r=0, **LINEARS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **LINEARS),
    "VeRA": lambda: peft.VeraConfig(r=4, **SOME),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, **LINEARS),
    "HRA": lambda: peft.HRAConfig(r=4, **LINEARS),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=16, **LINEARS),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=16, **LINEARS),
    "VBLoRA": lambda: peft.VBLoRAConfig(num_vectors=16, vector_length=8, r=2, **LINEARS),
    "MiSS": lambda: peft.MissConfig(r=4, **LINEARS),
    "MiSS, bat": lambda: peft.MissConfig(r=4, init_weights="bat", **LINEARS),
    "SHiRA": lambda: peft.ShiraConfig(r=4, **LINEARS),
    "RoAd": lambda: peft.RoadConfig(group_size=8, **LINEARS),
    "C3A": lambda: peft.C3AConfig(block_size=8, **LINEARS),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, **LINEARS),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, gralora_k=2, **LINEARS),
    "HiRA": lambda: peft.HiraConfig(r=4, **LINEARS),
    "PSOFT": lambda: peft.PsoftConfig(r=4, **LINEARS),
    "GLoRA": lambda: peft.GloraConfig(r=4, **LINEARS),
}
REFUSED = {"GLoRA": "PEFT asks for type(module) is nn.Linear and takes no subclass"}
# These put what is left of the weight back into the base when they are injected.
REPLACES_BASE = {"PiSSA", "OLoRA"}


def llama() -> LlamaForCausalLM:
    """A small float model, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    )
    return LlamaForCausalLM(config).eval()


def packed_llama(spec: IntSpec) -> LlamaForCausalLM:
    model = llama()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(module, format="int", spec=spec))
    return model


def packed_state(model: nn.Module) -> list[Tensor]:
    return [
        tensor.clone()
        for module in model.modules()
        if isinstance(module, QuantLinear)
        for tensor in module.neutral_tensors("weight").values()
    ]


def inject(model: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # Methods that change the base say so, ours and theirs.
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def train(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    error = ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
    assert error <= tolerance, error


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost these small matrices more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in REFUSED:
        pytest.skip(REFUSED[name])
    return name


def test_train_save_and_reload(method: str, ids: Tensor, tmp_path: Path) -> None:
    model = inject(packed_llama(FOUR_BITS), METHODS[method]())
    before = packed_state(model)
    if method not in REPLACES_BASE:
        assert all(
            torch.equal(*pair)
            for pair in zip(before, packed_state(packed_llama(FOUR_BITS)), strict=True)
        )
    # The same adapters on the dequantized weights: what the gradients must be.
    twin = copy.deepcopy(model)
    merge_to_float(twin)
    assert not any(isinstance(module, QuantLinear) for module in twin.modules())
    for _ in range(2):
        actual, wanted = gradients(model, ids), gradients(twin, ids)
        assert actual and actual.keys() == wanted.keys()
        for name in actual:
            assert (actual[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name
        # Adapters that start as zero have gradients of zero: look again after a step.
        torch.manual_seed(2)
        losses = train(model, ids, 1)
        torch.manual_seed(2)
        assert losses == pytest.approx(train(twin, ids, 1), rel=1e-4)
        twin.load_state_dict(
            {k: v for k, v in model.state_dict().items() if k in twin.state_dict()}, strict=False
        )
    losses = train(model, ids, 5)
    assert losses[-1] < losses[0]
    assert all(torch.equal(*pair) for pair in zip(before, packed_state(model), strict=True))
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = peft.PeftModel.from_pretrained(packed_llama(FOUR_BITS), tmp_path).eval()
    close(reloaded(ids).logits, logits, 1e-5)
    merge_to_float(model)
    close(model(ids).logits, logits, 1e-5)
    close(model.merge_and_unload().eval()(ids).logits, logits, 1e-4)


def test_merging_without_loss(method: str, ids: Tensor) -> None:
    model = inject(packed_llama(LOSSLESS), METHODS[method]())
    train(model, ids, 3)
    twin = copy.deepcopy(model)
    merge_to_float(twin)
    logits = model(ids).logits
    close(twin(ids).logits, logits, 1e-5)
    for each in (model, twin):
        each.merge_adapter(safe_merge=True)
    close(model(ids).logits, twin(ids).logits, 1e-4)
    close(model(ids).logits, logits, 1e-3)
    for each in (model, twin):
        each.unmerge_adapter()
    close(model(ids).logits, twin(ids).logits, 1e-4)
    close(model(ids).logits, logits, 1e-3)
    merged, wanted = (each.merge_and_unload(safe_merge=True).eval() for each in (model, twin))
    close(merged(ids).logits, wanted(ids).logits, 1e-4)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, QuantLinear)
    for name, module in merged.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.weight, wanted.get_submodule(name).weight)
    assert not any("lora" in name for name, _ in merged.named_modules())
