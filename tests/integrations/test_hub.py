"""Pushing to and loading from a Hub, with the real client against a stand-in server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

import hfq

from .hub_server import TOKEN, Hub, running_hub

# Runs pieces of code in a process that knows no other Hub than the stand-in: huggingface_hub reads
# HF_ENDPOINT when it is imported. One process for all tests, since importing torch takes seconds.
_WORKER = """
import json, sys, time, traceback
import torch, hfq
from hfq.integrations import hub
from transformers import AutoModelForCausalLM
time.sleep = lambda seconds: None  # the client waits between its retries
torch.set_num_threads(1)
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    result = None
    try:
        scope = dict(globals())
        exec(json.loads(line), scope)
        answer = {"result": scope.get("result")}
    except Exception as err:
        answer = {"error": type(err).__name__, "message": str(err), "trace": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
"""

Run = Callable[[str], object]


class ClientError(Exception):
    """What the code in the worker raised, as "name: message"."""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def mended(hub: Hub) -> None:
    hub.objects_until_break = None
    hub.received.clear()
    hub.requests.clear()


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(hfq.__file__).parents[1]),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", _WORKER]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(code: str) -> object:
            print(json.dumps(code), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            if "error" in answer:
                raise ClientError(f"{answer['error']}: {answer['message']}")
            return answer["result"]

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model with a card."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_link: LICENSE\nlanguage: en\n---\n# base\n"
    )
    return folder


@pytest.fixture(scope="module")
def saved(base: Path, client: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model quantized and saved in several shards."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-int4"
    client(f"""
config = hfq.HfqConfig(bits=4, group_size=32)
model = AutoModelForCausalLM.from_pretrained({str(base)!r}, quantization_config=config)
model.save_pretrained({str(folder)!r}, max_shard_size="12KB")
""")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_pushed_folder_arrives_byte_for_byte_and_loads(
    hub: Hub, client: Run, saved: Path
) -> None:
    (saved / ".cache").mkdir()
    (saved / ".cache" / "note").write_text("private")
    commit = client(f"result = hub.push_to_hub({str(saved)!r}, 'team/tiny', tags=['demo']).oid")
    history = hub.repositories["team/tiny"].branches["main"]
    assert len(history) == 2, "everything must arrive in one commit"
    assert history[-1][0] == commit
    sent = hub.repositories["team/tiny"].files
    local = {name: data for name, data in files(saved).items() if name != "README.md"}
    assert sum(name.endswith(".safetensors") for name in local) > 2
    assert {
        name: data for name, data in sent.items() if name not in ("README.md", ".gitattributes")
    } == local
    card = ModelCard(sent["README.md"].decode())
    assert {"hfq", "rtn", "4-bit", "demo"} <= set(card.data.tags)
    assert 'from_pretrained("team/tiny"' in card.content
    same = client(f"""
tokens = torch.arange(12)[None]
there = AutoModelForCausalLM.from_pretrained("team/tiny")
here = AutoModelForCausalLM.from_pretrained({str(saved)!r})
result = torch.equal(there(tokens).logits, here(tokens).logits)
""")
    assert same is True


def test_a_broken_upload_is_clear_and_continues(hub: Hub, client: Run, saved: Path) -> None:
    hub.objects.clear()
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.glob("*.safetensors")}
    hub.objects_until_break = 2
    with pytest.raises(
        ClientError, match=r"PushError: could not push .* to team/broken: .*[Pp]ush again"
    ):
        client(f"hub.push_to_hub({str(saved)!r}, 'team/broken')")
    arrived = set(hub.received)
    assert len(arrived) == 2 and arrived < shards
    assert set(hub.repositories["team/broken"].files) == {".gitattributes"}, (
        "nothing half-written in the repository"
    )

    hub.objects_until_break = None
    hub.received.clear()
    client(f"hub.push_to_hub({str(saved)!r}, 'team/broken')")
    assert sorted(hub.received) == sorted(shards - arrived), (
        "only what was missing is sent, and once"
    )
    sent = hub.repositories["team/broken"].files
    assert {
        hashlib.sha256(data).hexdigest()
        for name, data in sent.items()
        if name.endswith(".safetensors")
    } == shards


def test_a_short_interruption_is_not_even_noticed(hub: Hub, client: Run, saved: Path) -> None:
    hub.objects.clear()
    hub.objects_until_break = 1
    hub.may_receive = _fails_once(hub)  # type: ignore[method-assign]
    try:
        client(f"hub.push_to_hub({str(saved)!r}, 'team/shaky')")
    finally:
        del hub.may_receive
    assert "config.json" in hub.repositories["team/shaky"].files


def _fails_once(hub: Hub) -> Callable[[], bool]:
    answers = iter([True, False])

    def may_receive() -> bool:
        with hub.lock:
            return next(answers, True)

    return may_receive


def test_plain_push_to_hub_sends_our_card_and_knows_its_base(
    hub: Hub, client: Run, base: Path
) -> None:
    source = hub.create("maker/base", files(base))
    commit = source.branches["main"][-1][0]
    client("""
config = hfq.HfqConfig(method="hqq", bits=8, group_size=32)
model = AutoModelForCausalLM.from_pretrained("maker/base", quantization_config=config)
model.push_to_hub("quantized", commit_message="eight bits", tags=["mine"])
""")
    pushed = hub.repositories["tester/quantized"]
    assert pushed.branches["main"][-1][1] == "eight bits"
    card = ModelCard(pushed.files["README.md"].decode())
    known = card.data.to_dict()
    assert known["base_model"] == "maker/base" and known["base_model_relation"] == "quantized"
    assert known["library_name"] == "transformers" and known["pipeline_tag"] == "text-generation"
    assert known["tags"] == ["hfq", "hqq", "8-bit", "mine"]
    assert known["license"] == "other" and known["license_name"]
    assert known["license_link"] == "https://huggingface.co/maker/base/blob/main/LICENSE"
    assert commit in card.content
    assert "This is the model card of a" not in card.content, (
        "Transformers' empty card must not win"
    )
    assert json.loads(pushed.files["config.json"])["quantization_config"]["bits"] == 8


def test_save_pretrained_with_push_sends_what_it_wrote(
    hub: Hub, client: Run, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pushed-while-saving"
    folder.mkdir()
    (folder / "optimizer.bin").write_bytes(b"not for the public")
    client(f"""
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
options = dict(commit_message="both", max_shard_size="20KB")
model.save_pretrained({str(folder)!r}, push_to_hub=True, **options)
""")
    sent = hub.repositories["tester/pushed-while-saving"].files
    assert "optimizer.bin" not in sent
    local = files(folder)
    assert {name for name in local if name != "optimizer.bin"} == set(sent) - {".gitattributes"}
    assert all(
        sent[name] == data
        for name, data in local.items()
        if name.endswith((".safetensors", ".json"))
    )


def test_shards_of_an_earlier_push_do_not_shadow_the_new_ones(
    hub: Hub, client: Run, saved: Path
) -> None:
    old = {
        "model.safetensors": b"old",
        "model-00001-of-00009.safetensors": b"old",
        "tokenizer.json": b"{}",
    }
    repository = hub.create("team/again", old)
    client(f"hub.push_to_hub({str(saved)!r}, 'team/again')")
    assert (
        "model.safetensors" not in repository.files
        and "model-00001-of-00009.safetensors" not in repository.files
    )
    assert repository.files["tokenizer.json"] == b"{}"


def test_a_card_that_somebody_wrote_stays(hub: Hub, client: Run, saved: Path) -> None:
    theirs = b"---\nlicense: mit\ntags:\n- old\n---\n# My own words\n"
    repository = hub.create("team/card", {"README.md": theirs})
    client(f"hub.push_to_hub({str(saved)!r}, 'team/card')")
    assert repository.files["README.md"] == theirs
    client(f"hub.push_to_hub({str(saved)!r}, 'team/card', tags=['new'])")
    text = repository.files["README.md"].decode()
    assert "# My own words" in text and ModelCard(text).data.tags == ["old", "new"]


def test_branches_and_pull_requests(hub: Hub, client: Run, saved: Path) -> None:
    client(f"hub.push_to_hub({str(saved)!r}, 'team/branches', revision='next')")
    repository = hub.repositories["team/branches"]
    assert "config.json" in repository.find("next")[2] and "config.json" not in repository.files
    url = client(
        f"result = hub.push_to_hub({str(saved)!r}, 'team/branches', create_pr=True).pr_url"
    )
    assert str(url).endswith("/discussions/1")
    assert (
        "config.json" in repository.find("refs/pr/1")[2] and "config.json" not in repository.files
    )


def test_a_missing_token_is_told(client: Run, saved: Path) -> None:
    with pytest.raises(ClientError, match=r"PushError: .*hf auth login"):
        client(f"hub.push_to_hub({str(saved)!r}, 'team/secret', token='hf_wrong')")


@pytest.mark.parametrize("damage", ["no config", "no shard", "short shard"])
def test_an_incomplete_folder_is_not_pushed(
    hub: Hub, client: Run, saved: Path, tmp_path: Path, damage: str
) -> None:
    for name, data in files(saved).items():
        (tmp_path / name).write_bytes(data)
    shard = min(tmp_path.glob("*.safetensors"))
    if damage == "no config":
        (tmp_path / "config.json").unlink()
    elif damage == "no shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ClientError, match=r"CheckpointError: .*save"):
        client(f"hub.push_to_hub({str(tmp_path)!r}, 'team/incomplete')")
    assert hub.requests == []


def test_an_adapter_is_pushed_as_ever(hub: Hub, client: Run, saved: Path) -> None:
    client(f"""
from peft import LoraConfig
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
model.push_to_hub("adapter")
""")
    sent = set(hub.repositories["tester/adapter"].files)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= sent
    assert not any(name.startswith("model") for name in sent)
