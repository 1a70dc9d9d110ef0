"""Native code for a decode step: which modules get it, that they compute the same, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    Glm4MoeConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
)

from hfq import HfqConfig
from hfq.integrations import decode, decode_modules, growing_cache
from hfq.kernels import native

from . import tiny_models
from .tiny_models import CONFIGS, build

pytestmark = [
    pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels"),
    # PEFT asks for the old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {**tiny_models.SIZES, "pad_token_id": 0}

# Model -> norms, gates and attentions that native code takes.
FAMILIES: dict[str, tuple[Callable[[], Any], tuple[int, int, int]]] = {
    "llama": (lambda: LlamaConfig(**SIZES, attention_bias=True), (5, 2, 2)),
    "one key head": (lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}), (5, 2, 2)),
    "heads of 8": (lambda: LlamaConfig(**SIZES, head_dim=8), (5, 2, 0)),
    "mistral": (lambda: MistralConfig(**SIZES, sliding_window=12), (5, 2, 2)),
    "qwen2": (lambda: Qwen2Config(**SIZES), (5, 2, 2)),
    "qwen3": (lambda: Qwen3Config(**SIZES, head_dim=16), (9, 2, 2)),
    "gemma": (lambda: GemmaConfig(**SIZES, head_dim=16), (5, 2, 2)),
    # No layer without positions has a kernel.
    "smollm3": (lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0]), (5, 2, 1)),
    "granite": (lambda: GraniteConfig(**SIZES, attention_multiplier=0.4), (5, 2, 2)),
    # Scores through tanh: newer versions of Transformers have no sdpa for that, older ones leave it away with sdpa.
    "gemma2": (lambda: Gemma2Config(**SIZES, head_dim=16), (9, 2, 2)),
    # Norms of q and k over all heads; pairs of neighbours; one projection for all.
    "olmo2": (lambda: Olmo2Config(**SIZES), (9, 2, 0)),
    "cohere": (lambda: CohereConfig(**SIZES), (0, 2, 0)),
    "phi3": (lambda: Phi3Config(**SIZES), (5, 0, 0)),
    "mixtral": (CONFIGS["mixtral"], (5, 0, 2)),
    "gpt_oss": (CONFIGS["gpt_oss"], (5, 0, 0)),
    "gpt2": (CONFIGS["gpt2"], (0, 0, 0)),
}


def model_of(make: Callable[[], Any]) -> PreTrainedModel:
    """A random model whose norms are no identities."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.3)
    return model


def prompt(*lengths: int) -> dict[str, Tensor]:
    """Sequences of these lengths, filled up from the left."""
    ids = torch.randint(
        3, 128, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1)
    )
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, *lengths: int, **settings: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20} | settings
    return model.generate(
        **prompt(*lengths), **settings, return_dict_in_generate=True, output_logits=True
    )


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often native code was asked."""
    counts = dict.fromkeys(("norm", "gate", "attention"), 0)
    for name in counts:
        function = getattr(decode_modules, f"native_{name}")

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(decode_modules, f"native_{name}", counted)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_with_native_code(family: str, calls: dict[str, int]) -> None:
    make, (norms, gates, attentions) = FAMILIES[family]
    model = model_of(make)
    attentions *= model.config._attn_implementation == "sdpa"
    expected = generate(model, 9, 5)
    found = decode.install(model)
    assert found == {"norms": norms, "gates": gates, "attentions": attentions}
    calls.update(dict.fromkeys(calls, 0))
    assert_same(generate(model, 9, 5), expected)
    # A prompt and 19 steps; attention in the steps only.
    assert calls == {"norm": 20 * norms, "gate": 20 * gates, "attention": 19 * attentions}
    decode.remove(model)
    assert not any(isinstance(module, decode_modules.Native) for module in model.modules())
    calls.update(dict.fromkeys(calls, 0))
    assert_same(generate(model, 9, 5), expected)
    assert not any(calls.values())


class Scaled(nn.Module):
    """Like a norm, but for positions far away."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return 1.001 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Tempered(nn.Module):
    """Attention that looks at the position, as long texts need."""

    def __new__(cls, attention: nn.Module) -> Any:
        plain: Any = type(attention)

        def forward(self: Any, hidden_states: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
            found, weights = plain.forward(self, hidden_states, position_ids=position_ids, **kwargs)
            return found * (1.0 + (position_ids[:, :, None] > 8192)), weights

        attention.__class__ = type("Tempered", (plain,), {"forward": forward})
        return attention


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_in_modules_that_accelerate_has_hooked(family: str, calls: dict[str, int]) -> None:
    """As all modules are whose model is spread over several GPUs."""
    model = model_of(FAMILIES[family][0])
    expected = generate(model, 9, 5)
    accelerate.dispatch_model(
        model, {"model": "cpu", "lm_head": torch.device("cpu")}, main_device="cpu"
    )
    assert hasattr(model.model.layers[0].self_attn, "_hf_hook")
    for _ in range(2):
        assert decode.install(model)["attentions"] == 2
        calls.update(dict.fromkeys(calls, 0))
        assert_same(generate(model, 9, 5), expected)
        assert calls["attention"] == 19 * 2 and calls["norm"]
        decode.remove(model)
        calls.update(dict.fromkeys(calls, 0))
        assert_same(generate(model, 9, 5), expected)
        assert not any(calls.values())
    decode.install(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same(generate(model, 9, 5), expected)
    assert calls["attention"] == 19 * 2


def test_what_computes_something_else_is_left_alone() -> None:
    assert decode.install(Scaled()) == {"norms": 0, "gates": 0, "attentions": 0}
    model = model_of(FAMILIES["llama"][0])
    layers: Any = model.get_submodule("model.layers")
    Tempered(layers[1].self_attn)
    layers[0].mlp.act_fn = nn.GELU()
    assert decode.install(model) == {"norms": 5, "gates": 1, "attentions": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: NemotronConfig(**SIZES, head_dim=32, partial_rotary_factor=0.5),
        lambda: Glm4MoeConfig(
            **SIZES | {"num_hidden_layers": 1},
            head_dim=32,
            partial_rotary_factor=0.5,
            use_qk_norm=True,
            first_k_dense_replace=1,
        ),
    ],
    ids=["nemotron", "glm4_moe"],
)
def test_rotary_embeddings_of_a_part_of_each_head(make: Any, calls: dict[str, int]) -> None:
    """Only a call shows how much of a head turns: stand-ins turn all of it."""
    model = model_of(make)
    expected = generate(model, 9, 5)
    assert decode.install(model)["attentions"] == model.config.num_hidden_layers
    assert_same(generate(model, 9, 5), expected)
    calls.update(dict.fromkeys(calls, 0))
    generate(model, 9, 5)
    assert calls["attention"] == 0


def test_defaults_of_the_caller_change_nothing() -> None:
    model = model_of(FAMILIES["qwen3"][0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = decode.install(model)
    finally:
        torch.set_default_dtype(before)
    assert found == {"norms": 9, "gates": 2, "attentions": 2}


@pytest.fixture
def llama() -> PreTrainedModel:
    return model_of(FAMILIES["llama"][0])


def test_ways_to_generate(llama: PreTrainedModel, calls: dict[str, int]) -> None:
    ways: list[dict[str, Any]] = [
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.0, "use_cache": False},
    ]
    for settings in ways:
        lengths = (9,) if "prompt_lookup_num_tokens" in settings else (9, 4)
        decode.remove(llama)
        expected = generate(llama, *lengths, **settings)
        decode.install(llama)
        before = calls["attention"]
        assert_same(generate(llama, *lengths, **settings), expected)
        assert (calls["attention"] > before) == settings.get("use_cache", True)


def test_recorded_hidden_states_and_hooks(llama: PreTrainedModel) -> None:
    expected = generate(llama, 6, output_hidden_states=True)
    decode.install(llama)
    found = generate(llama, 6, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    layer: Any = llama.get_submodule("model.layers.1")
    seen: list[str] = []
    for name in ("self_attn", "self_attn.k_proj", "mlp.down_proj", "input_layernorm"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    generate(llama, 6, max_new_tokens=2, min_new_tokens=2)
    assert len(seen) == 8 and len(set(seen)) == 4


def test_attention_weights_come_from_the_models_own_code(llama: PreTrainedModel) -> None:
    decode.install(llama)
    llama.set_attn_implementation("eager")
    found = generate(llama, 6, output_attentions=True)
    assert all(each is not None for step in found.attentions for each in step)


def test_gradients_and_training(llama: PreTrainedModel) -> None:
    batch = prompt(9)
    llama(**batch, labels=batch["input_ids"]).loss.backward()
    expected = {name: each.grad.clone() for name, each in llama.named_parameters()}
    llama.zero_grad()
    decode.install(llama)
    llama(**batch, labels=batch["input_ids"]).loss.backward()
    for name, each in llama.named_parameters():
        assert torch.equal(each.grad, expected[name])


def test_copies_and_pickles(llama: PreTrainedModel, tmp_path: Path) -> None:
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
        assert_same(generate(other, 7), expected)
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
    # Once more changes nothing.
    kinds = [type(module) for module in llama.modules()]
    decode.install(llama)
    assert [type(module) for module in llama.modules()] == kinds


# ---- the growing cache


def step(model: Any, cache: DynamicCache, token: int = 5) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([[token]]), past_key_values=cache).logits
    return logits


def filled(model: Any, length: int = 9) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt(length), past_key_values=cache)
    return cache


def test_a_cache_grows_in_place_and_beyond(llama: PreTrainedModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(growing_cache, "_LEAST_ROOM", 3)
    expected, found = filled(llama), filled(llama)
    for token in range(3, 40):
        decode.remove(llama)
        theirs = step(llama, expected, token)
        decode.install(llama)
        torch.testing.assert_close(step(llama, found, token), theirs, rtol=1e-4, atol=1e-5)
        for ours, other in zip(found.layers, expected.layers, strict=True):
            torch.testing.assert_close(ours.keys, other.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.values, other.values, rtol=1e-4, atol=1e-5)
        assert found.get_seq_length() == expected.get_seq_length()


def test_what_was_seen_of_a_cache_never_changes(llama: PreTrainedModel) -> None:
    decode.install(llama)
    cache = filled(llama)
    step(llama, cache)
    seen = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    deep = copy.deepcopy(cache)
    first = step(llama, cache, 7)
    # Cropped to before the last token and continued otherwise: what was taken before stays.
    taken = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    step(llama, cache, 9)
    step(llama, cache, 11)
    for tensor, copied in seen + taken:
        assert torch.equal(tensor, copied)
    # Copies go on from where they were made.
    for each in (other, deep):
        assert torch.equal(step(llama, each, 7), first)


def test_a_cache_from_inference_mode_goes_on_outside(llama: PreTrainedModel) -> None:
    decode.install(llama)
    with torch.inference_mode():
        cache = filled(llama)
        step(llama, cache)
    first = step(llama, cache)
    with torch.inference_mode():
        step(llama, cache)
    assert first.isfinite().all() and cache.get_seq_length() == 12


def test_other_caches_keep_their_own_way(llama: PreTrainedModel) -> None:
    decode.install(llama)
    cache = StaticCache(config=llama.config, max_cache_len=20)
    with torch.no_grad():
        llama(**prompt(9), past_key_values=cache)
    step(llama, cache)
    assert all(layer.keys.shape[2] == 20 for layer in cache.layers)
    assert not any(hasattr(layer, "_hfq_memory") for layer in cache.layers)


# ---- with packed weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def packed(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = HfqConfig(bits=4, group_size=32, kernel_mode="exact", **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def test_from_pretrained_installs_it(folder: Path, calls: dict[str, int]) -> None:
    plain = packed(folder, decode_kernels=False)
    expected = generate(plain, 9, 4)
    assert not any(calls.values())
    model = packed(folder)
    calls.update(dict.fromkeys(calls, 0))
    assert_same(generate(model, 9, 4), expected)
    assert calls == {"norm": 100, "gate": 40, "attention": 38}
    model.save_pretrained(folder / "packed")
    again = AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert any(isinstance(module, decode_modules.Native) for module in again.modules())
    back = model.dequantize()
    assert not any(isinstance(module, decode_modules.Native) for module in back.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_in_16_bits(folder: Path, dtype: torch.dtype) -> None:
    plain, model = packed(folder, dtype, decode_kernels=False), packed(folder, dtype)
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for token in ([[5, 9, 20, 3]], [[7]], [[8]], [[9]]):
            found, expected = (
                each(torch.tensor(token), past_key_values=cache).logits.float()
                for each, cache in zip((model, plain), caches, strict=True)
            )
            assert (found - expected).norm() < 0.02 * expected.norm()


def test_adapters(folder: Path) -> None:
    found = []
    for native_code in (True, False):
        torch.manual_seed(3)
        model: Any = packed(folder, decode_kernels=native_code)
        targets = ["q_proj", "gate_proj", "o_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        found.append(generate(peft.get_peft_model(model, config).eval(), 8, 3))
    assert_same(*found)


def test_a_compiler_sees_the_models_own_code(llama: PreTrainedModel, calls: dict[str, int]) -> None:
    decode.install(llama)
    before = dict(calls)
    compiled: Any = torch.compile(llama.model.layers[0].mlp, backend="eager", fullgraph=True)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = compiled(x)
        assert calls == before
        torch.testing.assert_close(llama.model.layers[0].mlp(x), found)
