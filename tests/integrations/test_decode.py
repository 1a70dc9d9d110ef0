"""Native code for a decode step: which modules get it, and that they compute the same."""

from __future__ import annotations

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
from transformers.generation import GenerationConfig, GenerationMode

from hfq import HfqConfig
from hfq.integrations import decode, decode_modules
from hfq.kernels import native

from .decode_models import (
    CALLS,
    SIZES,
    assert_same,
    counted,
    generate,
    llama_config,
    model_of,
)
from .tiny_models import CONFIGS, build

pytestmark = [
    pytest.mark.skipif(not native.load().cpu, reason="no native CPU kernels"),
    # PEFT asks for the old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


# Model -> norms, gates and attentions that native code takes.
FAMILIES: dict[str, tuple[Callable[[], Any], tuple[int, int, int]]] = {
    "llama": (llama_config, (5, 2, 2)),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_with_native_code(family: str, native_calls: dict[str, int]) -> None:
    make, (norms, gates, attentions) = FAMILIES[family]
    model = model_of(make)
    attentions *= model.config._attn_implementation == "sdpa"
    expected = generate(model, 9, 5)
    found = decode.install(model)
    assert found == {"norms": norms, "gates": gates, "attentions": attentions}
    counted(native_calls)
    assert_same(generate(model, 9, 5), expected)
    # A prompt and 19 steps; attention in the steps only.
    assert native_calls == {"norm": 20 * norms, "gate": 20 * gates, "attention": 19 * attentions}
    decode.remove(model)
    assert not any(isinstance(module, decode_modules.Native) for module in model.modules())
    counted(native_calls)
    assert_same(generate(model, 9, 5), expected)
    assert not any(native_calls.values())


# Settings of `generate`, the mode that Transformers takes for them, and steps whose attention is native.
WAYS: dict[str, tuple[dict[str, Any], GenerationMode, bool]] = {
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, GenerationMode.BEAM_SEARCH, True),
    "sampling": ({"do_sample": True, "top_k": 20}, GenerationMode.SAMPLE, True),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, GenerationMode.ASSISTED_GENERATION, True),
    "static cache": ({"cache_implementation": "static"}, GenerationMode.GREEDY_SEARCH, True),
    "no cache": ({"use_cache": False}, GenerationMode.GREEDY_SEARCH, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(way: str, llama: PreTrainedModel, native_calls: dict[str, int]) -> None:
    settings, mode, attends = WAYS[way]
    chosen = GenerationConfig(**{"do_sample": False} | settings)
    assert chosen.get_generation_mode() == mode
    lengths = (9,) if way == "prompt lookup" else (9, 4)
    found = []
    for change in (decode.remove, decode.install):
        change(llama)
        torch.manual_seed(0)  # of the samples
        found.append(generate(llama, *lengths, **settings))
    assert_same(*found)
    assert (native_calls["attention"] > 0) == attends and native_calls["norm"] > 0
    kind = {"static cache": StaticCache, "no cache": type(None)}.get(way, DynamicCache)
    assert type(found[0].past_key_values) is type(found[1].past_key_values) is kind


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
def test_in_modules_that_accelerate_has_hooked(family: str, native_calls: dict[str, int]) -> None:
    """As all modules are whose model is spread over several GPUs."""
    model = model_of(FAMILIES[family][0])
    expected = generate(model, 9, 5)
    accelerate.dispatch_model(
        model, {"model": "cpu", "lm_head": torch.device("cpu")}, main_device="cpu"
    )
    assert hasattr(model.model.layers[0].self_attn, "_hf_hook")
    for _ in range(2):
        assert decode.install(model)["attentions"] == 2
        counted(native_calls)
        assert_same(generate(model, 9, 5), expected)
        assert native_calls["attention"] == 19 * 2 and native_calls["norm"]
        decode.remove(model)
        counted(native_calls)
        assert_same(generate(model, 9, 5), expected)
        assert not any(native_calls.values())
    decode.install(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same(generate(model, 9, 5), expected)
    assert native_calls["attention"] == 19 * 2


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
def test_rotary_embeddings_of_a_part_of_each_head(make: Any, native_calls: dict[str, int]) -> None:
    """Only a call shows how much of a head turns: stand-ins turn all of it."""
    model = model_of(make)
    expected = generate(model, 9, 5)
    assert decode.install(model)["attentions"] == model.config.num_hidden_layers
    assert_same(generate(model, 9, 5), expected)
    counted(native_calls)
    generate(model, 9, 5)
    assert native_calls["attention"] == 0


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


# ---- with packed weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def packed(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = HfqConfig(bits=4, group_size=32, kernel_mode="exact", **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def test_from_pretrained_installs_it(folder: Path, native_calls: dict[str, int]) -> None:
    plain = packed(folder, decode_kernels=False)
    expected = generate(plain, 9, 4)
    assert not any(native_calls.values())
    model = packed(folder)
    counted(native_calls)
    assert_same(generate(model, 9, 4), expected)
    assert native_calls == CALLS
    model.save_pretrained(folder / "packed")
    again = AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert any(isinstance(module, decode_modules.Native) for module in again.modules())
    back = model.dequantize()
    assert not any(isinstance(module, decode_modules.Native) for module in back.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_in_16_bits(folder: Path, dtype: torch.dtype, native_calls: dict[str, int]) -> None:
    plain, model = packed(folder, dtype, decode_kernels=False), packed(folder, dtype)
    caches = [DynamicCache(), DynamicCache()]
    counted(native_calls)
    with torch.no_grad():
        for token in ([[5, 9, 20, 3]], [[7]], [[8]], [[9]]):
            expected = plain(torch.tensor(token), past_key_values=caches[0]).logits.float()
            assert not any(counted(native_calls).values())
            found = model(torch.tensor(token), past_key_values=caches[1]).logits.float()
            attentions = 2 * (len(token[0]) == 1)
            assert counted(native_calls) == {"norm": 5, "gate": 2, "attention": attentions}
            assert (found - expected).norm() < 0.02 * expected.norm()


def test_adapters(folder: Path, native_calls: dict[str, int]) -> None:
    found = []
    for native_code in (True, False):
        torch.manual_seed(3)
        model: Any = packed(folder, decode_kernels=native_code)
        targets = ["q_proj", "gate_proj", "o_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        counted(native_calls)
        found.append(generate(adapted, 8, 3))
        assert counted(native_calls) == (CALLS if native_code else dict.fromkeys(CALLS, 0))
    assert_same(*found)
    with adapted.disable_adapter():
        assert not torch.equal(generate(adapted, 8, 3).logits[0], found[1].logits[0])
