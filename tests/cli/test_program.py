"""The command line as a whole, and the commands that only look."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

import hfq
from hfq.cli import main
from hfq.diagnose import Check, Diagnosis
from hfq.evaluation import evaluate
from hfq.inspection import inspect_checkpoint
from hfq.integrations import streaming

pytestmark = pytest.mark.usefixtures("gate_in_this_process")


@pytest.fixture(scope="session")
def packed_model(float_model, tmp_path_factory):
    """Folder of the float model at 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "packed"
    with pytest.MonkeyPatch.context() as patch:
        # `hfq quantize` is tested elsewhere; here a process that loads the folder costs seconds.
        patch.setattr(streaming, "check_reloaded", lambda *args: (0.0, None))
        assert main(["quantize", str(float_model), "-o", str(folder), "--group-size", "16"]) == 0
    return folder


def test_a_process_of_its_own():
    def run(*words):
        return subprocess.run([sys.executable, "-m", "hfq", *words], capture_output=True, text=True)

    version = run("--version")
    assert (version.returncode, version.stdout) == (0, f"hfq {hfq.__version__}\n")
    help_text = run("--help")
    listed = ("quantize", "eval", "inspect", "explain", "doctor", "push")
    assert help_text.returncode == 0 and all(f"    {name} " in help_text.stdout for name in listed)
    nothing = run()
    assert nothing.returncode == 2 and nothing.stdout == "" and "COMMAND" in nothing.stderr


def test_help_is_quick_without_torch():
    code = "import sys, hfq.cli.program as m; m._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_inspect(packed_model, capsys):
    assert main(["inspect", str(packed_model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(inspect_checkpoint(packed_model).to_dict()))
    assert main(["inspect", str(packed_model)]) == 0
    assert "bits per weight" in capsys.readouterr().out


def test_inspect_of_a_damaged_checkpoint(packed_model, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((packed_model / "config.json").read_bytes())
    weights = (packed_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1])
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hfq: error: ") and err.count("\n") == 1


def test_eval(packed_model, float_model, text, capsys):
    words = ["eval", str(packed_model), "--text", str(text), "--reference", str(float_model)]
    assert main([*words, "--seqlen", "32", "--json", "--no-speed"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    expected = evaluate(str(packed_model), float_model, dataset=text, seqlen=32, speed=False)
    assert err == ""
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-5) and found["kl"] > 0
    assert found["predicted_tokens"] == 90 - 3
    assert main([*words, "--max-tokens", "30"]) == 0
    out, _ = capsys.readouterr()
    assert "KL(reference || model)" in out and "tokens/s" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "words.csv"], "expected a .txt, .jsonl or .parquet file"),
        (["--seqlen", "1"], "seqlen must be at least 2"),
        (["--reference", "./no/where"], "cannot load ./no/where"),
    ],
)
def test_eval_failures_are_one_line(packed_model, text, capsys, flags, message):
    assert main(["eval", str(packed_model), "--text", str(text), *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_eval_without_text(packed_model, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(packed_model)])
    assert stop.value.code == 2 and "--text" in capsys.readouterr().err


def test_numbers_that_json_lacks_are_null(packed_model, text, capsys, monkeypatch):
    monkeypatch.setattr("hfq.evaluation.run.weight_size", lambda model: NotANumber())
    main(["eval", str(packed_model), "--text", str(text), "--no-speed", "--json"])
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] is None


class NotANumber:
    packed_bytes = kept_bytes = 0
    bits_per_weight = math.nan


def test_explain(packed_model, capsys):
    assert main(["explain", str(packed_model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["weights"]) == 14 and found["summary"].startswith("quantized 14 of 16")
    assert main(["explain", str(packed_model), "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert "model.layers.*.mlp.up_proj" in capsys.readouterr().out


def test_doctor(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    broken = Diagnosis(checks=(Check(name="torch", status="broken", found="2.0", remedy="update"),))
    monkeypatch.setattr("hfq.diagnose.doctor", lambda **_: broken)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "torch: update" in out and err == ""


def test_push(packed_model, capsys, monkeypatch):
    class Commit:
        oid, commit_url = "0123", "https://example.org/commit/0123"

    calls = []

    def push_to_hub(source, repo, **options):
        calls.append((source, repo, options))
        return Commit()

    monkeypatch.setattr("hfq.integrations.hub.push_to_hub", push_to_hub)
    assert main(["push", str(packed_model), "me/model", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == "0123"
    assert calls == [(str(packed_model), "me/model", {"private": True})]


def test_push_of_nothing(tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/model"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hfq: error: ") and err.count("\n") == 1


def test_what_libraries_print_stays_off_stdout(packed_model, capsys, monkeypatch):
    def chatty(path):
        sys.stdout.write("a library says hello\n")
        return inspect_checkpoint(path)

    monkeypatch.setattr("hfq.inspection.inspect_checkpoint", chatty)
    assert main(["inspect", str(packed_model), "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert err == "a library says hello\n"


def test_traceback_on_request(tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--traceback"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("hfq: error: ")


def test_a_reader_that_leaves(packed_model):
    """``hfq inspect ... | true`` is no error."""
    command = f"{sys.executable} -m hfq inspect {packed_model} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_doctor_runs_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None
import importlib.metadata, hfq.diagnose.installation as module
known = module._version
module._version = lambda name: None if name == "transformers" else known(name)
from hfq.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "transformers: pip install transformers" in done.stdout
    assert "Traceback" not in done.stderr
