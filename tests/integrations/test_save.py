"""Saving: a folder changes completely or not at all, and gets a model card."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hfq
from hfq.integrations import hub, staging
from hfq.integrations.card import is_ours, model_card, template_folder, write_card
from hfq.integrations.staging import STAGING, SaveError, stale_weights

TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# base\n")
    return folder


@pytest.fixture
def quantized(base: Path) -> Callable[..., PreTrainedModel]:
    def load(**settings: object) -> PreTrainedModel:
        config = hfq.HfqConfig(**{"bits": 4, "group_size": 32, **settings})
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=config)

    return load


@pytest.fixture
def model(quantized: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return quantized()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what is written


def test_a_saved_model_loads_equal_and_has_a_card(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "new" / "tiny")
    assert names(tmp_path / "new" / "tiny") == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "tiny")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_saving_over_an_older_save(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    sharded = names(tmp_path)
    assert sum(name.endswith(".safetensors") for name in sharded) > 2
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits
    )
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert names(tmp_path) == sharded, (
        "an old model.safetensors would be loaded instead of the new shards"
    )


def test_saving_into_the_folder_that_the_model_was_loaded_from(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert after["model.safetensors"] == before["model.safetensors"]


def test_saving_twice_gives_the_same_bytes(model: PreTrainedModel, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        model.save_pretrained(tmp_path / parent / "out", max_shard_size="12KB")
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_variants_live_side_by_side(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="packed", max_shard_size="12KB")
    model.save_pretrained(tmp_path, variant="packed")
    weights = {name for name in names(tmp_path) if name.startswith("model")}
    assert weights == {"model.safetensors", "model.packed.safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, variant="packed")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_rank_that_is_not_the_main_one_writes_nothing(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("present", "written", "stale"),
    [
        (["model.safetensors"], ["model-00001-of-00001.safetensors"], ["model.safetensors"]),
        (["model.safetensors.index.json"], ["model.safetensors"], ["model.safetensors.index.json"]),
        (
            ["model-00001-of-00003.safetensors"],
            ["model-00001-of-00002.safetensors"],
            ["model-00001-of-00003.safetensors"],
        ),
        (
            ["model.fp16.safetensors", "model.safetensors.index.fp16.json"],
            ["model.safetensors"],
            [],
        ),
        (
            ["model.fp16-00001-of-00002.safetensors"],
            ["model.fp16.safetensors"],
            ["model.fp16-00001-of-00002.safetensors"],
        ),
        (
            ["model.safetensors.index.fp16.json"],
            ["model.fp16.safetensors"],
            ["model.safetensors.index.fp16.json"],
        ),
        (
            ["adapter_model.safetensors", "model_card.txt", "models/model.safetensors"],
            ["model.safetensors"],
            [],
        ),
        (["model.safetensors"], ["model.safetensors"], []),
        (["model.safetensors"], ["README.md"], []),
    ],
)
def test_stale_weights(present: list[str], written: list[str], stale: list[str]) -> None:
    assert stale_weights(present, written) == stale


# ---- what goes wrong


@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_the_old_files(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    out = tmp_path / "out"
    if existed:
        model.save_pretrained(out)
        (out / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    calls = []

    def fill_up(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str]) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fill_up)
    with pytest.raises(
        SaveError, match=r"could not save the model to .*out: .*No space left.*Free space"
    ) as raised:
        model.save_pretrained(out, max_shard_size="12KB")
    assert raised.value.errno == errno.ENOSPC and isinstance(raised.value, (hfq.HfqError, OSError))
    assert len(calls) == 2
    assert contents(tmp_path) == before
    assert out.exists() == existed
    monkeypatch.undo()
    model.save_pretrained(out, max_shard_size="12KB")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits, model(TOKENS).logits
    )


def test_a_failing_move_is_undone(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    before = contents(tmp_path)
    model.config.bos_token_id = 7
    real, failing = os.replace, 0
    for failing in range(1, 100):
        count = 0

        def replace(source: Path, target: Path) -> None:
            nonlocal count
            count += 1
            if count == failing:  # noqa: B023  (called in this iteration only)
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
            real(source, target)

        monkeypatch.setattr(staging.os, "replace", replace)
        try:
            model.save_pretrained(tmp_path)
        except SaveError as err:
            assert "may write" in str(err)
            assert contents(tmp_path) == before, f"move {failing}"
        else:
            break
    assert failing > 8, "there are at least 5 files to set aside and 4 to put in place"
    assert "model.safetensors" in names(tmp_path)


def test_config_json_leaves_first_and_comes_last(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    real, loadable = os.replace, []

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        loadable.append((tmp_path / "config.json").exists())

    monkeypatch.setattr(staging.os, "replace", replace)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(loadable) > 6
    assert loadable == [False] * (len(loadable) - 1) + [True]


def test_a_file_in_place_of_the_folder(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("I am a file")
    with pytest.raises(SaveError, match=r"out: .*A file stands where a folder is expected"):
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"I am a file"}


_LIMITED = """
import os, resource, signal, sys
import hfq
from transformers import AutoModelForCausalLM, modeling_utils
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000_000))
for folder in sys.argv[2:]:
    try:
        model.save_pretrained(folder)
    except hfq.HfqError as err:
        print(type(err).__name__, err.errno, err, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
write = modeling_utils.safe_save_file
calls = []
def killed(tensors, path, metadata):
    calls.append(path)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, metadata=metadata)
modeling_utils.safe_save_file = killed
model.save_pretrained(sys.argv[2], max_shard_size="12KB")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE and SIGKILL")
def test_files_that_may_not_grow_and_a_killed_process(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    """Real system errors on the way of the real writer, in a process of its own."""
    old, new = tmp_path / "old", tmp_path / "new"
    model.save_pretrained(old)
    before = contents(old)
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, old, old, new],
        env={**os.environ, "PYTHONPATH": str(Path(hfq.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    reports = done.stdout.splitlines()
    assert [line.split()[:2] for line in reports] == [["SaveError", str(errno.EFBIG)]] * 2, (
        done.stderr
    )
    assert str(old) in reports[0] and "old files are untouched" in reports[0]
    assert str(new) in reports[1] and "Nothing was written" in reports[1]
    assert not new.exists()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {
        name: data for name, data in contents(old).items() if not name.startswith(STAGING)
    } == before
    assert (old / STAGING).is_dir(), "the process was killed while it was writing"
    AutoModelForCausalLM.from_pretrained(old).save_pretrained(old)
    assert not (old / STAGING).exists()


# ---- the model that carries the methods


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(
    model: PreTrainedModel, tmp_path: Path, copied: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    other = copied(model)
    with torch.no_grad():
        other.model.norm.weight.fill_(0.5)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert "README.md" in names(tmp_path / "other")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "other").model.norm.weight.unique().item()
        == 0.5
    )
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model").model.norm.weight.unique().item()
        == 1.0
    )


def test_the_methods_do_not_keep_the_model_alive(base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    hub.attach(model)
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_calls_can_be_chained(base: Path, tmp_path: Path) -> None:
    config = hfq.HfqConfig()
    LlamaForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(
        tmp_path / "out"
    )
    assert "README.md" in names(tmp_path / "out")


def test_a_loaded_model_is_freed_without_the_collector(base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base, quantization_config=hfq.HfqConfig())
    reference = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_the_class_keeps_its_name(model: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) is type(pickle.loads(pickle.dumps(model)))


def test_dequantize_gives_a_stock_model(model: PreTrainedModel, tmp_path: Path) -> None:
    model.dequantize()
    assert type(model) is LlamaForCausalLM
    model.save_pretrained(tmp_path)
    assert "README.md" not in names(tmp_path)


def test_an_adapter_is_saved_as_ever(model: PreTrainedModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path / "ours")
    type(model).save_pretrained(model, tmp_path / "stock")
    assert contents(tmp_path / "ours") == contents(tmp_path / "stock")
    assert "adapter_model.safetensors" in names(tmp_path / "ours")


# ---- the card


def test_metadata_of_the_card(quantized: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = quantized(
        method="hqq", overrides={r"(up|down)_proj$": {"bits": 8}, "layers.1.*q_proj": None}
    )
    model.save_pretrained(tmp_path / "tiny-hqq")
    card = ModelCard.load(tmp_path / "tiny-hqq" / "README.md")
    assert metadata_load(tmp_path / "tiny-hqq" / "README.md") == card.data.to_dict()
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hfq", "hqq", "4-bit"],
    }
    text = card.content
    assert repr(model.config.quantization_config) in text
    assert (
        eval(repr(model.config.quantization_config), {"HfqConfig": hfq.HfqConfig})
        == model.config.quantization_config
    )
    assert 'AutoModelForCausalLM.from_pretrained("tiny-hqq"' in text
    assert "| `model.layers.*.mlp.up_proj` | 2 | int, 8 bits, groups of 32, " in text
    assert "| `model.layers.*.self_attn.q_proj` | 1 | int, 4 bits, groups of 32, " in text
    assert len(re.findall(r"groups of 32, \d+\.\d\d bits per weight", text)) >= 2
    assert "| `model.layers.*.self_attn.q_proj` | 1 | float: overrides |" in text
    assert "model-index" not in text and "eval_results" not in text


def test_numbers_of_the_card_are_those_of_the_file(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    weights = sum(p.numel() for p in LlamaForCausalLM(model.config).parameters())
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    stored = (tmp_path / "model.safetensors").stat().st_size - header
    assert f"**{8 * stored / weights:.2f} bits per weight**" in (tmp_path / "README.md").read_text()


def test_measured_results_reach_the_model_index(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert write_card(
        model,
        tmp_path,
        results={"perplexity": 12.345678, "kl": 0.0123},
        dataset="wikitext",
        command="hfq quantize x",
    )
    card = ModelCard.load(tmp_path / "README.md")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"perplexity": 12.345678, "kl": 0.0123}
    assert {result.dataset_name for result in card.data.eval_results} == {"wikitext"}
    assert "| perplexity | 12.35 |" in card.content and "hfq quantize x" in card.content
    assert names(tmp_path) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_no_number_is_refused(model: PreTrainedModel, value: float) -> None:
    with pytest.raises(hfq.ConfigError, match="perplexity"):
        model_card(model, name="x", results={"perplexity": value})


def test_somebody_elses_card_stays_ours_is_renewed(model: PreTrainedModel, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("my own words")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "my own words"
    assert not write_card(model, tmp_path)
    card.unlink()
    model.save_pretrained(tmp_path)
    assert is_ours(card.read_text())
    card.write_text(card.read_text() + "an edit below the line that says so")
    model.save_pretrained(tmp_path)
    assert "an edit" not in card.read_text()


def test_what_is_known_of_the_base_survives_a_second_save(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    card = ModelCard.load(first / "README.md")
    card.data.base_model, card.data["base_model_relation"] = "maker/base", "quantized"
    card.data["base_model_revision"] = "0" * 40
    card.save(first / "README.md")
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(second)
    again = ModelCard.load(second / "README.md")
    assert (
        again.data.base_model == "maker/base" and again.data["base_model_relation"] == "quantized"
    )
    assert again.data.license == "apache-2.0"
    assert f"| base revision | {'0' * 40} |" in again.content


def test_a_base_in_the_cache_is_known_by_its_commit(base: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--maker--base" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(base)
    model = AutoModelForCausalLM.from_pretrained(
        snapshot, quantization_config=hfq.HfqConfig(bits=4, group_size=32)
    )
    data = model_card(model, name="x").data.to_dict()
    assert data["base_model"] == "maker/base" and data["base_model_relation"] == "quantized"
    assert data["base_model_revision"] == commit and data["license"] == "apache-2.0"


def test_a_damaged_card_of_the_base_is_no_obstacle(base: Path, tmp_path: Path) -> None:
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=hfq.HfqConfig(bits=4, group_size=32)
    )
    assert model_card(model, name="x").data.license is None


def test_templates_are_found_in_a_clone_and_in_a_wheel(tmp_path: Path) -> None:
    assert template_folder(Path(hfq.__file__).parent).name == "model_cards"
    package = tmp_path / "site-packages" / "hfq"
    package.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="install hfq again"):
        template_folder(package)
    for place in (tmp_path / "site-packages" / "model_cards", package / "model_cards"):
        place.mkdir()
        (place / "quantized.md.jinja").write_text("")
        assert template_folder(package) == place
