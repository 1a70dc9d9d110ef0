"""``hfq quantize``: what it writes, says and refuses."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfq import HfqConfig
from hfq.cli import main
from hfq.inspection import inspect_checkpoint
from hfq.integrations import gate, streaming

pytestmark = pytest.mark.usefixtures("gate_in_this_process")


def tree(folder):
    """Relative path -> digest of every file below, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def quantize(float_model, tmp_path, capsys):
    """Run the command; (exit code, stdout, stderr)."""

    def run(*flags, source=float_model, output=tmp_path / "out"):
        code = main(["quantize", str(source), "-o", str(output), "--group-size", "16", *flags])
        return code, *capsys.readouterr()

    return run


def logits(folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    with torch.no_grad():
        return model(input_ids=torch.arange(16)[None]).logits


def test_it_saves_what_from_pretrained_gives(quantize, float_model, tmp_path):
    code, out, err = quantize("--bits", "3", "--asym")
    assert (code, err) == (0, "")
    config = HfqConfig(bits=3, group_size=16, sym=False)
    expected = logits(float_model, quantization_config=config)
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the row").input_ids == [1, 9]
    assert "quantized 14 of 16" in out and "output head" in out and "input embedding" in out
    # A long path takes several lines of the table.
    assert "identical logits" in out and str(tmp_path / "out") in "".join(out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any(name.startswith(".") for name in tree(tmp_path / "out"))


def test_json_is_one_object(quantize, tmp_path):
    code, out, err = quantize(
        "--json", "--quantize-embeddings", "--quantize-lm-head", "--format", "nf4"
    )
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["quantized"] == 16 and report["kept"] == {}
    assert report["settings"]["format"] == "nf4"
    summary = inspect_checkpoint(tmp_path / "out")
    assert (
        report["bytes_after"] == summary.packed_bytes + summary.kept_bytes < report["bytes_before"]
    )
    assert report["bits_per_weight"] == pytest.approx(summary.bits_per_weight)
    assert report["logit_difference"] == 0


def test_overrides_and_skips(quantize, tmp_path):
    flags = [
        "--override",
        'down_proj={"bits": 8}',
        "--override",
        "(?=.*q_proj)=null",
        "--skip",
        "layers.1",
    ]
    code, _, _ = quantize(*flags, "--method", "hqq", "--iterations", "3")
    assert code == 0
    bits = {weight.name: weight.bits for weight in inspect_checkpoint(tmp_path / "out").packed}
    assert bits.pop("model.layers.0.mlp.down_proj") == 8
    assert len(bits) == 5 and set(bits.values()) == {4}
    assert not any("q_proj" in name or "layers.1" in name for name in bits)


def test_int8_activations(float_model, text, tmp_path, capsys):
    flags = ["--method", "smoothquant", "--activation", "static", "--smoothing", "0.5"]
    data = ["--dataset", str(text), "--seqlen", "16", "--num-samples", "4"]
    out = str(tmp_path / "out")
    assert main(["quantize", str(float_model), "-o", out, *flags, *data]) == 0
    assert "identical logits" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["activation"], settings["smoothing"]) == ("static", 0.5)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_input_scale"].shape == (1,)


def test_8_bit_floats(float_model, tmp_path, capsys):
    out = str(tmp_path / "out")
    flags = ["--format", "fp8", "--activation", "dynamic"]
    assert main(["quantize", str(float_model), "-o", out, *flags]) == 0
    assert "identical logits" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert "fp8" in (tmp_path / "out" / "README.md").read_text()
    assert main(["inspect", out]) == 0
    assert "fp8" in capsys.readouterr().out


def test_the_card_has_the_command(quantize, tmp_path):
    quantize("--bits", "8")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hfq quantize" in card and "--bits 8" in card and "# out" in card


def test_somebodys_own_card_stays(quantize, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    code, _, _ = quantize()
    assert code == 0
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "9"], "bits must be an integer from 2 to 8, got 9"),
        (["--method", "rnt"], "Did you mean 'rtn'?"),
        (["--format", "nf4", "--asym"], "no zero points"),
        (["--override", "down_proj"], "expected REGEX=JSON"),
        (["--override", '(={"bits": 8}'], "not a regular expression"),
        (["--override", 'x={"bitz": 8}'], "bitz"),
        (["--override", "x=3"], "expected a dict of settings"),
        (["--iterations", "3"], "unknown setting 'iterations'"),
        (["--sym", "--asym"], "not allowed with"),
        (["--bits", "four"], "invalid int"),
        (["--format", "fp8", "--bits", "4"], "got bits=4: expected 8"),
        (["--activation", "dynamic"], "format 'int' has no setting 'activation'"),
        (["--smoothing", "0.5"], "unknown setting 'smoothing'"),
    ],
)
def test_bad_usage_is_exit_code_2(quantize, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        quantize(*flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_overwritten_by_its_quantization(quantize, float_model, capsys):
    before = tree(float_model)
    with pytest.raises(SystemExit) as stop:
        quantize(output=float_model)
    assert stop.value.code == 2 and "give another folder" in capsys.readouterr().err
    assert tree(float_model) == before


def one_line(result, tmp_path):
    """The error of a failed run, which left nothing behind."""
    code, out, err = result
    assert (code, out) == (1, "") and err.startswith("hfq: error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return err


def test_missing_models(quantize, tmp_path):
    assert "nowhere" in one_line(quantize(source=tmp_path / "nowhere"), tmp_path)


def test_quantized_models_are_refused(quantize, tmp_path):
    quantize(output=tmp_path / "first")
    assert "quantized already (by hfq)" in one_line(quantize(source=tmp_path / "first"), tmp_path)


def test_damaged_models(quantize, float_model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in float_model.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    assert "model.safetensors" in one_line(quantize(source=broken), tmp_path)


def test_weights_with_nan_are_named(quantize, float_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(float_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    assert "layers.1.mlp.up_proj" in one_line(quantize(source=tmp_path / "nan"), tmp_path)


def test_a_save_that_does_not_reload_is_withdrawn(quantize, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    monkeypatch.setattr(gate, "_from_new_process", lambda *args: (-gate.logits_of(*args), None))
    assert "does not reproduce" in one_line(quantize(), tmp_path)
    code, _, _ = quantize(output=tmp_path / "old")
    assert code == 1 and tree(tmp_path / "old").keys() == {"config.json"}
    assert (tmp_path / "old" / "config.json").read_text() == "{}"


def test_an_interrupted_run_goes_on(quantize, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "check_reloaded", interrupted)
        code, out, err = quantize()
    assert (code, out, err) == (130, "", "hfq: interrupted\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hfq-resume"]
    code, out, _ = quantize()
    assert code == 0 and "2 finished blocks" in out
    assert not any(name.startswith(".") for name in tree(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "check_reloaded", interrupted)
        quantize(output=tmp_path / "other")
    code, _, err = quantize("--bits", "3", output=tmp_path / "other")
    assert code == 1 and "--no-resume" in err
    code, out, _ = quantize("--bits", "3", "--no-resume", output=tmp_path / "other")
    assert code == 0 and "finished blocks" not in out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_may_not_be_written(quantize, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    code, _, err = quantize(output=tmp_path / "closed" / "out")
    assert code == 1 and "closed" in err


def test_an_output_that_is_a_file(quantize, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = quantize(output=tmp_path / "file")
    assert code == 1 and "file" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "x"
