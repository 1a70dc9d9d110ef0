"""Which weights are packed, which are kept, and the reason that is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hfq import ConfigError, HfqConfig
from hfq.integrations.selection import select_modules

from .tiny_models import CONFIGS, build


def skeleton(kind: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[kind]())


@pytest.mark.parametrize(
    ("kind", "packed", "kept"),
    [
        ("llama", 14, {"model.embed_tokens": "input embedding", "lm_head": "output head"}),
        (
            "llama_tied",
            14,
            {
                "model.embed_tokens": "tied to the output head",
                "lm_head": "tied to model.embed_tokens",
            },
        ),
        (
            "gpt2",
            8,
            {
                "transformer.wte": "tied to the output head",
                "lm_head": "tied to transformer.wte",
                "transformer.wpe": "embedding that is not the input's",
            },
        ),
        ("mixtral", 12, {"model.embed_tokens": "input embedding", "lm_head": "output head"}),
    ],
)
def test_every_weight_is_packed_or_has_a_reason(
    kind: str, packed: int, kept: dict[str, str]
) -> None:
    selection = select_modules(skeleton(kind), HfqConfig())
    assert sum(len(bases) for bases in selection.recipes.values()) == packed
    assert selection.kept == kept
    assert selection.summary().startswith(
        f"quantized {packed} of {packed + len(kept)} weights; kept {len(kept)}: "
    )


def test_on_request_nothing_is_kept() -> None:
    config = HfqConfig(quantize_embeddings=True, quantize_lm_head=True)
    selection = select_modules(skeleton("llama"), config)
    assert selection.summary() == "quantized 16 of 16 weights"


def test_overrides_and_skipped_modules_give_their_reason() -> None:
    config = HfqConfig(overrides={r"o_proj$": None}, modules_to_not_convert=["layers.1"])
    kept = select_modules(skeleton("llama"), config).kept
    assert kept["model.layers.0.self_attn.o_proj"] == "overrides"
    assert kept["model.layers.1.self_attn.o_proj"] == "modules_to_not_convert"


def test_a_tied_head_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantize_embeddings=True to pack both"):
        select_modules(skeleton("llama_tied"), HfqConfig(quantize_lm_head=True))


def test_classes_with_code_of_their_own_stay_float() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = build("llama")
    model.model.layers[0].mlp.up_proj = Scaled(64, 96)
    kept = select_modules(model, HfqConfig()).kept
    assert kept["model.layers.0.mlp.up_proj"] == "Scaled has code of its own"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_weights_without_elements_are_not_touched(shape: tuple[int, int]) -> None:
    model = build("llama")
    model.extra = nn.Linear(*shape)
    selection = select_modules(model, HfqConfig())
    assert "extra" not in selection.recipes and "extra" not in selection.kept
