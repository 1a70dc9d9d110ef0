"""``hfq plan``: the flags of ``hfq quantize``, nothing written."""

from __future__ import annotations

import json

import pytest

from hfq.cli import main
from hfq.cli.program import _parser

pytestmark = pytest.mark.usefixtures("gate_in_this_process", "brief_rates")


def test_it_says_what_quantize_will_do(float_model, text, tmp_path, capsys):
    flags = ["--method", "gptq", "--group-size", "16", "--dataset", str(text), "--seqlen", "16"]
    flags += ["--num-samples", "4"]
    before = sorted(path.name for path in float_model.iterdir())
    code = main(["plan", str(float_model), "-o", str(tmp_path / "out"), *flags])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    for word in ("model.layers.*.mlp.down_proj", "gptq", "kept 1", "output head", "64 tokens"):
        assert word in out
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in float_model.iterdir()) == before
    assert main(["plan", str(float_model), "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["quantize", str(float_model), "-o", str(tmp_path / "out"), *flags]) == 0
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert plan["bytes_after"] == size and plan["predicted"]["seconds"] > 0


def test_every_setting_of_quantize_is_one_of_plan():
    commands = next(a for a in _parser()._actions if hasattr(a, "choices") and a.choices)
    flags = {
        name: {word for action in commands.choices[name]._actions for word in action.option_strings}
        for name in ("quantize", "plan")
    }
    only_a_run_has = {"--push-to-hub", "--resume", "--no-resume"}
    assert flags["quantize"] - flags["plan"] == only_a_run_has
    assert not flags["plan"] - flags["quantize"]


def test_what_is_wrong_with_it(float_model, tmp_path, capsys):
    assert main(["plan", str(tmp_path / "nowhere")]) == 1
    assert "is no folder here: a plan reads local files only" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(float_model), "--bits", "9"])
    assert "bits must be an integer from 2 to 8, got 9" in capsys.readouterr().err
    assert main(["plan", str(float_model), "--method", "gptq", "--group-size", "20"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "! no dataset is given (dataset=..., --dataset): the model samples its own" in out
    assert "group_size 20 does not divide the 32 columns of 12 weights" in out


def test_target_bits_on_the_command_line(float_model, text, tmp_path, capsys):
    flags = ["--method", "rtn", "--group-size", "16", "--dataset", str(text), "--seqlen", "16"]
    flags += ["--target-bits", "4.5", "--candidate-bits", "2", "4"]
    assert main(["plan", str(float_model), *flags]) == 0
    assert "2/4" in capsys.readouterr().out
    assert main(["quantize", str(float_model), "-o", str(tmp_path / "out"), *flags]) == 0
    assert "bits per weight (target 4.5), predicted KL" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(float_model), "--candidate-bits", "2", "4"])
    assert "give target_bits, too" in capsys.readouterr().err
