"""Several processes quantize one model together: what one process gives, and no one is left waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hfq.integrations.report import REPORT
from hfq.integrations.resume import FOLDER

from .tiny_models import QUICK, build, load

# Libraries are imported once; each scenario forks its processes. They leave one line: the error, or how many blocks
# were found finished.
_PROGRAM = """
import contextlib, io, json, multiprocessing, os, sys
import torch, transformers, hfq
from datetime import timedelta
from torch import distributed
from transformers import AutoModelForCausalLM
from hfq.calibration import ranks, run, sensitivity
from hfq.cli import main
from hfq.integrations import gate, streaming

def work(scenario, rank, size, port):
    torch.set_num_threads(1)
    gate._from_new_process = lambda *args: (gate.logits_of(*args), None)
    name, source, output, tokens, settings = scenario
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if name == "cli":
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = main(["quantize", source, "-o", output, "--group-size", "32", "--json"])
        with open(f"{output}-{rank}.txt", "w") as file:
            file.write(f"{code} {printed.getvalue()}")
        os._exit(0)
    if size > 1:
        distributed.init_process_group("gloo", rank=rank, world_size=size)
    report = None
    if name == "absent":
        ranks._ARRIVAL = timedelta(seconds=1)
        if rank == 1:
            distributed.distributed_c10d._get_default_store().wait(["done"], timedelta(seconds=60))
            os._exit(0)
    if name in ("fails", "breaks", "dies") and rank == 1:
        quantized, count = run.choose_codes, [0]
        def fail(*args):
            count[0] += 1
            if count[0] == 5:
                if name == "dies":
                    os._exit(9)
                raise (hfq.CalibrationError if name == "fails" else ZeroDivisionError)("on purpose")
            return quantized(*args)
        run.choose_codes = fail
    if name in ("measures", "dies measuring") and rank == 1:
        block = sensitivity.Sensitivity.block
        def fail_at_second(self, index):
            if index == 1:
                if name == "dies measuring":
                    os._exit(9)
                ranks_before = self.run.ranks.divided
                def divided(costs, work):
                    def failing(choice):
                        raise hfq.CalibrationError("on purpose")
                    return ranks_before(costs, failing)
                self.run.ranks.divided = divided
            return block(self, index)
        sensitivity.Sensitivity.block = fail_at_second
    config = hfq.HfqConfig(dataset=torch.load(tokens), kernel_mode="exact", **settings)
    if name == "differs" and rank == 1:
        config.seqlen = 7
    message = ""
    try:
        report = hfq.quantize(source, output, config, dtype="float32")
        message = f"resumed {report.resumed_blocks} processes {report.processes}"
    except hfq.HfqError as error:
        message = f"{type(error).__name__}: {error}"
    except ZeroDivisionError as error:
        message = f"ZeroDivisionError: {error}"
    if name == "absent":
        distributed.distributed_c10d._get_default_store().set("done", "")
    with open(f"{output}-{rank}.txt", "w") as file:
        file.write(message)
    os._exit(0)

fork = multiprocessing.get_context("fork")
for port, size, scenario in json.loads(sys.argv[1]):
    children = [fork.Process(target=work, args=(scenario, rank, size, port)) for rank in range(size)]
    for child in children: child.start()
    for child in children: child.join(120)
    for child in children:
        if child.is_alive():
            child.kill()
            print("hangs:", scenario[0])
"""

DATA = {"group_size": 32, "num_samples": 21}
GPTQ = {"method": "gptq", **DATA, **QUICK}
GPTAQ = {"method": "gptq", **DATA, "gptaq": 0.5}
AWQ = {"method": "awq", **DATA, "awq_steps": 3, "quantize_lm_head": True}
SCENARIOS: list[tuple[str, str, int, str, dict[str, object]]] = [
    ("gptaq-1", "llama", 1, "", GPTAQ),
    ("gptaq-2", "llama", 2, "", GPTAQ),
    ("experts-1", "mixtral", 1, "", GPTQ),
    ("experts-3", "mixtral", 3, "", GPTQ),
    ("awq-1", "llama", 1, "", AWQ),
    ("awq-2", "llama", 2, "", AWQ),
    ("target-1", "mixtral", 1, "", {**GPTQ, "target_bits": 4.1}),
    ("target-3", "mixtral", 3, "", {**GPTQ, "target_bits": 4.1}),
    ("few-3", "llama", 3, "", {**GPTQ, "num_samples": 2}),
    ("few-1", "llama", 1, "", {**GPTQ, "num_samples": 2}),
    ("fails-2", "llama", 2, "fails", GPTQ),
    ("measuring-2", "llama", 2, "measures", {**GPTQ, "target_bits": 4.1}),
    ("breaks-2", "llama", 2, "breaks", GPTQ),
    ("differs-2", "llama", 2, "differs", GPTQ),
    ("absent-2", "llama", 2, "absent", GPTQ),
    ("cli-2", "llama", 2, "cli", {}),
    ("resumed-2", "llama", 2, "dies", GPTAQ),
    ("resumed-2", "llama", 2, "again", GPTAQ),
    ("target_resumed-3", "mixtral", 3, "dies measuring", {**GPTQ, "target_bits": 4.1}),
    ("target_resumed-3", "mixtral", 3, "again", {**GPTQ, "target_bits": 4.1}),
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of each scenario, and what each of its processes said."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in {scenario[1] for scenario in SCENARIOS}:
        build(kind).save_pretrained(folder / kind)
    # Two lengths: batches of both must go to the right places.
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(128, (32 if i % 3 else 20,), generator=generator) for i in range(32)]
    torch.save(rows, folder / "tokens.pt")
    words = [
        (
            free_port(),
            size,
            (what, str(folder / kind), str(folder / name), str(folder / "tokens.pt"), settings),
        )
        for name, kind, size, what, settings in SCENARIOS
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "hangs" not in done.stdout, done.stdout
    return folder


def said(results: Path, name: str) -> list[str]:
    return [
        (results / f"{name}-{rank}.txt").read_text()
        for rank in range(3)
        if (results / f"{name}-{rank}.txt").exists()
    ]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = load(folder)(torch.arange(34).view(2, 17)).logits
    return found


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("gptaq-1", "gptaq-2"),
        ("experts-1", "experts-3"),
        ("awq-1", "awq-2"),
        ("few-1", "few-3"),
        ("gptaq-2", "resumed-2"),
        ("target-1", "target-3"),
        ("target-3", "target_resumed-3"),
    ],
)
def test_several_processes_give_what_one_gives(results: Path, one: str, several: str) -> None:
    first, second = (load_file(results / name / "model.safetensors") for name in (one, several))
    assert first.keys() == second.keys()
    codes = [name for name, tensor in first.items() if tensor.dtype == torch.uint8]
    assert len(codes) >= 12
    differing = sum(int((first[name] != second[name]).sum()) for name in codes)
    assert differing <= 0.01 * sum(first[name].numel() for name in codes)
    expected = logits(results / one)
    torch.testing.assert_close(logits(results / several), expected, rtol=0, atol=0.02)
    reports = [json.loads((results / name / REPORT).read_text()) for name in (one, several)]
    for before, after in zip(*(each["calibration"]["weights"] for each in reports), strict=True):
        for key in ("name", "method", "tokens", "note", "damping"):
            assert before[key] == after[key]
        assert before["error"] == pytest.approx(after["error"], rel=0.02)
    assert reports[0]["calibration"]["sha256"] == reports[1]["calibration"]["sha256"]
    # 32 sequences, of which those that were not calibrated with are held out.
    assert reports[0]["held_out"] == pytest.approx(reports[1]["held_out"], rel=0.05)


def test_several_processes_share_out_the_same_bits(results: Path) -> None:
    names = ("target-1", "target-3", "target_resumed-3")
    one, several, resumed = (
        json.loads((results / name / REPORT).read_text())["allocation"] for name in names
    )
    assert several == resumed
    assert one["bits"] == several["bits"] and len(set(one["bits"])) > 1
    for before, after in zip(one["groups"], several["groups"], strict=True):
        assert before["names"] == after["names"] and before["bytes"] == after["bytes"]
        assert before["costs"] == pytest.approx(after["costs"], rel=0.02)
    assert not list((results / "target_resumed-3").glob(".*"))


def test_all_processes_have_the_report_and_one_writes(results: Path) -> None:
    assert said(results, "experts-3") == ["resumed 0 processes 3"] * 3
    assert not list((results / "experts-3").glob(".*"))
    assert json.loads((results / "experts-3" / REPORT).read_text())["processes"] == 3


def test_a_launcher_s_processes_join_and_the_first_one_talks(results: Path) -> None:
    """``torchrun -m hfq quantize`` sets variables of the environment, nothing else."""
    first, second = said(results, "cli-2")
    code, _, printed = first.partition(" ")
    assert code == "0" and json.loads(printed)["processes"] == 2
    assert second == "0 "


def test_an_error_in_one_process_is_told_by_all(results: Path) -> None:
    first, second = said(results, "fails-2")
    assert second.startswith("CalibrationError: on purpose")
    assert first == "CalibrationError: process 1 of 2: on purpose"
    assert not (results / "fails-2").exists()
    first, second = said(results, "measuring-2")
    assert second == "CalibrationError: on purpose"
    assert first == "CalibrationError: process 1 of 2: on purpose"
    assert not (results / "measuring-2").exists()
    first, second = said(results, "breaks-2")
    assert second == "ZeroDivisionError: on purpose"
    assert first == "ProcessError: process 1 of 2: ZeroDivisionError('on purpose')"


def test_different_calls_are_refused(results: Path) -> None:
    for message in said(results, "differs-2"):
        assert message.startswith("ConfigError: the processes of a group quantize one model")
        assert "settings was another than in process" in message


def test_who_does_not_come_is_not_waited_for(results: Path) -> None:
    (message,) = said(results, "absent-2")
    assert message.startswith("ProcessError: hfq.quantize must be called by all 2 processes")


def test_a_process_that_dies_stops_the_others_and_the_run_goes_on(results: Path) -> None:
    """The second call of this scenario; the first ended with block 0 done."""
    assert said(results, "resumed-2") == ["resumed 1 processes 2"] * 2
    assert not (results / "resumed-2" / FOLDER).exists()
