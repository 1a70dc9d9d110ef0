"""What tests of several files ask for: one thread, tiny models, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hfq.integrations import decode_modules

from .decode_models import llama_config, model_of
from .tiny_models import build


@pytest.fixture(autouse=True)
def one_thread_everywhere(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are tiny: threads would wait for each other longer than they work, in new processes as well."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    """32 sequences of 32 tokens to calibrate with."""
    return torch.randint(128, (32, 32), generator=generator)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A float Llama in files of 50 kB."""
    build("llama").save_pretrained(tmp_path / "float", max_shard_size="50KB")
    return tmp_path / "float"


@pytest.fixture
def ids(generator: torch.Generator) -> Tensor:
    """Three sequences of nine tokens, for tests with PEFT."""
    return torch.randint(0, 64, (3, 9), generator=generator)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint of a small Llama, for tests with PEFT; never written to."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def llama() -> PreTrainedModel:
    """A float Llama in memory, for tests of native decode code."""
    return model_of(llama_config)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often native decode code was asked."""
    counts = dict.fromkeys(("norm", "gate", "attention"), 0)
    for name in counts:
        function = getattr(decode_modules, f"native_{name}")

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(decode_modules, f"native_{name}", counted)
    return counts
