"""`HfqConfig`: defaults, overrides, JSON, and an answer to every wrong setting."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from hfq import HfqConfig
from hfq.algorithms import ALGORITHMS
from hfq.config import Recipe
from hfq.core.errors import ConfigError, HfqError, UnknownNameError, VersionError
from hfq.core.spec import CodebookSpec, Fp8Spec, Int8Spec, IntSpec, QuantSpec
from hfq.formats import FORMAT_VERSION, FORMATS


def recipe(config: HfqConfig, name: str = "model.layers.0.mlp.up_proj") -> Recipe:
    found = config.recipe(name)
    assert found is not None
    return found


def through_json(config: HfqConfig) -> HfqConfig:
    again = HfqConfig.from_dict(json.loads(config.to_json_string()))
    assert isinstance(again, HfqConfig)
    return again


# ---- defaults


@pytest.mark.parametrize(
    ("settings", "method", "format_name", "spec"),
    [
        ({}, "rtn", "int", IntSpec()),
        ({"method": "hqq"}, "hqq", "int", IntSpec(sym=False)),
        ({"format": "nf4"}, "rtn", "nf4", CodebookSpec()),
        ({"format": "fp4"}, "rtn", "fp4", CodebookSpec(codebook="fp4")),
        ({"format": "int8"}, "rtn", "int8", Int8Spec()),
        ({"format": "fp8", "bits": 8, "group_size": -1}, "rtn", "fp8", Fp8Spec()),
        ({"bits": 3, "group_size": -1}, "rtn", "int", IntSpec(bits=3, group_size=-1)),
        ({"method": "hqq", "format": "int"}, "hqq", "int", IntSpec(sym=False)),
        ({"format": "nf4", "bits": 4, "sym": True}, "rtn", "nf4", CodebookSpec()),
        ({"format": "int", "double_quant": False}, "rtn", "int", IntSpec()),
    ],
)
def test_defaults_follow_the_method_and_the_format(
    settings: dict[str, Any], method: str, format_name: str, spec: QuantSpec
) -> None:
    config = HfqConfig(**settings)
    expected = Recipe(
        method=method, options=ALGORITHMS.get(method).options, format=format_name, spec=spec
    )
    assert recipe(config) == expected
    assert (config.method, config.format) == (method, format_name)
    assert (config.bits, config.group_size, config.sym) == (spec.bits, spec.group_size, spec.sym)


def test_the_method_may_stand_first() -> None:
    assert HfqConfig("hqq") == HfqConfig(method="hqq")


def test_options_of_the_method() -> None:
    assert recipe(HfqConfig(scale_search=True)).options == {"scale_search": True}
    assert recipe(HfqConfig("hqq", iterations=3)).options == {"iterations": 3}


@pytest.mark.every_spec
def test_every_spec_of_every_format_can_be_asked_for(format_name: str, spec: QuantSpec) -> None:
    settings = {name: value for name, value in vars(spec).items() if name != "codebook"}
    config = HfqConfig(format=format_name, **settings)
    assert recipe(config).spec == spec
    assert through_json(config) == config
    assert recipe(through_json(config)).spec == spec


def test_smoothquant_brings_int8_activations_along() -> None:
    for method in ("smoothquant", "smoothquant+gptq"):
        config = HfqConfig(method)
        assert (config.format, config.activation) == ("int8", "dynamic")
        assert recipe(config).spec == Int8Spec(activation="dynamic")
        assert config.options["smoothing"] == "search" and config.calibrated
        assert HfqConfig(method, format="int8").activation == "dynamic"
        assert HfqConfig(method, activation="static").activation == "static"


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("gptq", {}, "use method 'rtn' or 'smoothquant' with format 'fp8'"),
        ("smoothquant+gptq", {"activation": "dynamic"}, "not to 8-bit floats"),
        ("awq", {}, "those of format 'fp8' grow alike: use method 'rtn'"),
        ("awq+gptq", {}, "those of format 'fp8' grow alike"),
        ("hqq", {}, "optimises zero points"),
        ("spqr", {}, "format 'spqr'"),
        ("smoothquant", {}, "needs format 'int8' or 'fp8' with activation="),
        ("rtn", {"scale_search": True}, "leave scale_search out"),
    ],
)
def test_8_bit_floats_are_rounded_to_nearest(
    method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        HfqConfig(method, format="fp8", **settings)


def test_8_bit_floats_may_be_smoothed() -> None:
    config = HfqConfig("smoothquant", format="fp8", activation="dynamic")
    assert recipe(config).spec == Fp8Spec(activation="dynamic") and config.calibrated
    assert not HfqConfig(format="fp8", activation="dynamic").calibrated


def test_static_activations_need_data_whatever_the_method() -> None:
    assert not HfqConfig(format="int8").calibrated
    assert not HfqConfig(format="int8", activation="dynamic").calibrated
    static = HfqConfig(format="int8", activation="static", dataset=["text"])
    assert static.calibrated and recipe(static).calibrated and recipe(static).sampled
    assert "activation" not in HfqConfig(format="int8").to_dict()
    override = HfqConfig(format="int8", overrides={"q_proj": {"activation": "static"}})
    assert override.calibrated and not recipe(override).calibrated


# ---- which module gets what


def test_the_first_override_that_matches_counts() -> None:
    config = HfqConfig(
        group_size=32,
        overrides={
            r"layers\.0\..*down_proj$": {"bits": 8},
            r"down_proj$": {"bits": 3, "group_size": -1},
            r"router": None,
        },
    )
    assert recipe(config, "model.layers.0.mlp.down_proj").spec == IntSpec(bits=8, group_size=32)
    assert recipe(config, "model.layers.1.mlp.down_proj").spec == IntSpec(bits=3, group_size=-1)
    assert recipe(config, "model.layers.1.mlp.up_proj").spec == IntSpec(group_size=32)
    assert config.recipe("model.layers.1.mlp.router") is None


@pytest.mark.parametrize(
    ("base", "changed", "expected"),
    [
        # Changed fields only; the rest is inherited.
        ({"bits": 3, "group_size": 16}, {"bits": 8}, ("rtn", "int", IntSpec(bits=8, group_size=16))),
        ({"format": "nf4"}, {"double_quant": True}, ("rtn", "nf4", CodebookSpec(double_quant=True))),
        ({"sym": False}, {"bits": 8, "sym": True}, ("rtn", "int", IntSpec(bits=8))),
        ({"bits": 3}, {"bits": None}, ("rtn", "int", IntSpec(bits=3))),
        # Another format starts from its own defaults.
        ({"bits": 3}, {"format": "nf4"}, ("rtn", "nf4", CodebookSpec())),
        ({"bits": 3}, {"format": "int8"}, ("rtn", "int8", Int8Spec())),
        ({"format": "int8", "activation": "dynamic"}, {"format": "fp8"}, ("rtn", "fp8", Fp8Spec())),
        ({"format": "fp8"}, {"activation": "static"}, ("rtn", "fp8", Fp8Spec(activation="static"))),
        ({"format": "nf4"}, {"format": "int"}, ("rtn", "int", IntSpec())),
        ({"format": "nf4", "double_quant": True}, {"format": "fp4"}, ("rtn", "fp4", CodebookSpec(codebook="fp4"))),
        ({"format": "int8"}, {"format": "int", "bits": 2}, ("rtn", "int", IntSpec(bits=2))),
        # Another method brings what it prefers.
        ({"group_size": 16}, {"method": "hqq"}, ("hqq", "int", IntSpec(group_size=16, sym=False))),
        ({"format": "nf4"}, {"method": "hqq"}, ("hqq", "int", IntSpec(sym=False))),
        ({"format": "nf4"}, {"method": "hqq", "format": "int"}, ("hqq", "int", IntSpec(sym=False))),
        ({"method": "hqq"}, {"method": "rtn", "format": "nf4"}, ("rtn", "nf4", CodebookSpec())),
        ({"format": "nf4"}, {"method": "rtn", "group_size": 32}, ("rtn", "nf4", CodebookSpec(group_size=32))),
        # Float activations are a choice like the others.
        ({"format": "int8", "activation": "dynamic"}, {"activation": None}, ("rtn", "int8", Int8Spec())),
        ({"format": "int8", "activation": "dynamic"}, {"activation": "static"}, ("rtn", "int8", Int8Spec(activation="static"))),
        ({"format": "int8", "activation": "dynamic"}, {"format": "int"}, ("rtn", "int", IntSpec())),
        ({}, {"method": "smoothquant"}, ("smoothquant", "int8", Int8Spec(activation="dynamic"))),
        ({"method": "smoothquant"}, {"method": "rtn", "format": "int8", "activation": None}, ("rtn", "int8", Int8Spec())),
    ],
)  # fmt: skip
def test_an_override_changes_what_it_names(
    base: dict[str, Any], changed: dict[str, Any], expected: tuple[str, str, QuantSpec]
) -> None:
    found = recipe(HfqConfig(**base, overrides={"up_proj": changed}))
    assert (found.method, found.format, found.spec) == expected


def test_an_override_keeps_a_choice_against_the_preference_of_the_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preferred = {"format": "int", "sym": False}
    monkeypatch.setattr(type(ALGORITHMS.get("rtn")), "defaults", preferred)
    config = HfqConfig(sym=True, overrides={"down_proj": {"bits": 8}})
    assert recipe(config).spec == IntSpec() and recipe(HfqConfig()).spec == IntSpec(sym=False)
    assert recipe(config, "down_proj").spec == IntSpec(bits=8)


def test_options_are_inherited_by_the_same_method_only() -> None:
    config = HfqConfig(
        "hqq",
        iterations=5,
        overrides={"q_proj": {"bits": 8}, "k_proj": {"iterations": 7}, "v_proj": {"method": "rtn"}},
    )
    assert recipe(config, "q_proj").options == {"iterations": 5}
    assert recipe(config, "k_proj").options == {"iterations": 7}
    assert recipe(config, "v_proj").options == {"scale_search": False}


@pytest.mark.parametrize(
    ("skipped", "name", "stays"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm_head_2", False),
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.11.mlp.up_proj", False),
        ("mlp.gate", "model.layers.1.mlp.gate", True),
        ("mlp.gate", "model.layers.1.mlp.gate_proj", False),
    ],
)
def test_names_to_skip_match_whole_parts(skipped: str, name: str, stays: bool) -> None:
    config = HfqConfig(modules_to_not_convert=[skipped], overrides={".": {"bits": 8}})
    assert config.skips(name) == stays
    assert (config.recipe(name) is None) == stays


def test_overridden_tells_an_explicit_wish_from_a_default() -> None:
    config = HfqConfig(overrides={"lm_head": {"bits": 8}, "embed": None})
    assert config.overridden("lm_head")
    assert not config.overridden("embed_tokens") and not config.overridden("up_proj")


def test_bits_by_name_become_overrides() -> None:
    names = {
        f"model.layers.{n}.mlp.{kind}": 2 + n % 3 for n in range(12) for kind in ("up", "down")
    }
    names |= {"model.layers.0.experts.1.up": 8, "model.layers.0.experts.10.up": 3, "head": 8}
    config = HfqConfig(
        "gptq",
        target_bits=3.5,
        dataset=["text"],
        overrides={"down": {"group_size": 16}, r"\.up": {"sym": False}},
    )
    assert config.calibrated and config.candidate_bits == [2, 3, 4, 8]
    new = config.with_bits(names)
    assert (config.target_bits, new.target_bits, new.dataset) == (3.5, None, None)
    again = through_json(new)
    for name, bits in names.items():
        expected = IntSpec(
            bits=bits, group_size=16 if "down" in name else 128, sym=not name.endswith(".up")
        )
        assert recipe(new, name).spec == recipe(again, name).spec == expected
    for other in ("model.layers.12.mlp.up", "xmodel.layers.1.mlp.up", "model.layers.1.mlp.up_x"):
        assert recipe(new, other).spec == IntSpec(sym=False)
    # Twelve layers of two kinds: not an override for each.
    assert len(new.overrides) == 6 + 3 + 2


def test_overrides_that_fix_bits() -> None:
    overrides = {"a": {"bits": 8}, "b": {"format": "nf4"}, "c": {"group_size": 16}}
    config = HfqConfig("gptq", target_bits=4, overrides=overrides)
    assert [config.fixes_bits(name) for name in "abcd"] == [True, True, False, False]


# ---- JSON

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "hqq": {"method": "hqq", "iterations": 7, "bits": 3},
    "search": {"scale_search": True, "scale_dtype": "bfloat16"},
    "double quantization": {"format": "nf4", "double_quant": True},
    "int8": {"format": "int8"},
    "target": {"method": "awq+gptq", "target_bits": 3.25, "candidate_bits": [2, 3, 5]},
    "W8A8": {
        "format": "int8",
        "activation": "dynamic",
        "overrides": {"a": {"activation": None}, "b": {"activation": "static"}},
    },
    "smoothquant": {"method": "smoothquant", "activation": "static", "smoothing": 0.5},
    "everything": {
        "group_size": -1,
        # Not in alphabetical order: writers of JSON sort keys.
        "overrides": {"z": {"bits": 8}, "a": None, "m": {"format": "nf4", "double_quant": True}},
        "modules_to_not_convert": ["b", "a"],
        "quantize_embeddings": True,
        "quantize_lm_head": True,
    },
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> HfqConfig:
    return HfqConfig(**request.param)


def test_json_and_back(config: HfqConfig, tmp_path: Path) -> None:
    again = through_json(config)
    assert again == config and again.to_dict() == config.to_dict()
    assert list(again.overrides) == list(config.overrides)
    config.to_json_file(str(tmp_path / "config.json"))
    assert HfqConfig(**json.loads((tmp_path / "config.json").read_text())) == config
    for name in ("z.a", "a.z", "m", "b.z", "other"):
        assert again.recipe(name) == config.recipe(name)


def test_copies_are_equal_and_independent(config: HfqConfig) -> None:
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        assert again.recipe("z.a") == config.recipe("z.a")
        again.overrides["new"] = None
        assert again != config
    assert dict(config) == config.to_dict()


def test_the_dict_says_who_wrote_it_and_how_to_read_it(config: HfqConfig) -> None:
    from hfq import __version__

    written = config.to_dict()
    assert written["quant_method"] == "hfq"
    assert written["format_version"] == FORMAT_VERSION
    assert written["hfq_version"] == __version__
    assert {"method", "format", "bits", "group_size", "sym", "scale_dtype"} <= written.keys()
    # Settings of one load are no part of a checkpoint.
    assert not {"kernel_mode", "decode_kernels", "dequantize"} & written.keys()


def test_what_the_dict_holds_belongs_to_the_reader() -> None:
    config = HfqConfig(modules_to_not_convert=["a"], overrides={"b": {"bits": 8}})
    before = config.to_json_string()
    written = config.to_dict()
    written["modules_to_not_convert"].append("c")
    written["overrides"][0][1]["bits"] = 2
    assert config.to_json_string() == before


def test_arguments_are_only_read() -> None:
    overrides: dict[str, Any] = {"b": {"bits": 8}}
    names = ["a"]
    config = HfqConfig(modules_to_not_convert=names, overrides=overrides)
    overrides["b"]["bits"], overrides["c"] = 2, None
    names.append("d")
    assert config == HfqConfig(modules_to_not_convert=["a"], overrides={"b": {"bits": 8}})


def test_equality() -> None:
    assert HfqConfig() == HfqConfig(bits=4) != HfqConfig(bits=8)
    assert HfqConfig(overrides={"a": None, "b": {"bits": 8}}) != HfqConfig(
        overrides={"b": {"bits": 8}, "a": None}
    )
    assert HfqConfig() != "rtn"
    with pytest.raises(TypeError, match="unhashable"):
        hash(HfqConfig())


def test_repr_is_a_call(config: HfqConfig) -> None:
    assert eval(repr(config), {"HfqConfig": HfqConfig}) == config  # our own text, in a test


def test_loading_attributes() -> None:
    config = HfqConfig(dequantize=True, kernel_mode="exact", decode_kernels=False)
    assert config.get_loading_attributes() == {
        "dequantize": True,
        "kernel_mode": "exact",
        "decode_kernels": False,
    }


def test_from_dict_gives_back_what_it_does_not_know_if_asked() -> None:
    config, unused = HfqConfig.from_dict(  # type: ignore[misc]
        {"bits": 3}, return_unused_kwargs=True, group_size=16, device_map="auto"
    )
    assert config == HfqConfig(bits=3, group_size=16) and unused == {"device_map": "auto"}
    with pytest.raises(ConfigError, match="unknown setting 'device_map'"):
        HfqConfig.from_dict({"bits": 3}, device_map="auto")


def test_update_is_checked() -> None:
    config = HfqConfig(overrides={"up_proj": {"bits": 8}})
    assert config.update(group_size=16, dequantize=True, torch_dtype="auto") == {
        "torch_dtype": "auto"
    }
    assert config.dequantize and config.group_size == 16
    # Overrides inherit what was updated.
    assert recipe(config).spec == IntSpec(bits=8, group_size=16)
    before = config.to_dict()
    with pytest.raises(ConfigError, match="bits must be an integer from 2 to 8, got 9"):
        config.update(bits=9)
    assert config.to_dict() == before and config.dequantize


# ---- wrong settings

WRONG: list[tuple[dict[str, Any], type[HfqError], str]] = [
    ({"bits": 9}, ConfigError, "bits must be an integer from 2 to 8, got 9"),
    ({"bits": "4"}, ConfigError, "bits must be an integer from 2 to 8, got '4'"),
    ({"group_size": 0}, ConfigError, "group_size must be a positive integer, or -1 .* got 0"),
    ({"sym": "yes"}, ConfigError, "sym must be True or False, got 'yes'"),
    ({"scale_dtype": "float64"}, ConfigError, "scale_dtype must be one of .* got 'float64'"),
    ({"method": "rnt"}, UnknownNameError, "unknown method 'rnt': expected one of .*rtn.* Did you mean 'rtn'"),
    ({"method": None}, UnknownNameError, "unknown method None"),
    ({"format": "nf5"}, UnknownNameError, "unknown format 'nf5': expected one of .* Did you mean 'nf4'"),
    ({"grup_size": 64}, ConfigError, "unknown setting 'grup_size' for method 'rtn'.* Did you mean 'group_size'"),
    ({"scale_serch": True}, ConfigError, "unknown setting 'scale_serch'.* Did you mean 'scale_search'"),
    ({"iterations": 3}, ConfigError, "unknown setting 'iterations' for method 'rtn': expected one of"),
    ({"scale_search": 1}, ConfigError, "scale_search must be True or False, got 1"),
    ({"method": "hqq", "iterations": 0}, ConfigError, "iterations must be a positive integer, got 0"),
    ({"method": "hqq", "sym": True}, ConfigError, "needs format 'int' with sym=False"),
    ({"method": "hqq", "format": "nf4"}, ConfigError, "needs format 'int' with sym=False"),
    ({"format": "nf4", "bits": 8}, ConfigError, "format 'nf4' has 4 bits, got bits=8"),
    ({"format": "nf4", "sym": False}, ConfigError, "format 'nf4' has no zero points"),
    ({"format": "int8", "bits": 4}, ConfigError, "symmetric 8-bit codes .* use format 'int'"),
    ({"format": "int8", "scale_dtype": "float16"}, ConfigError, "float32 scales, got .*'float16'"),
    ({"double_quant": True}, ConfigError, "format 'int' has no setting 'double_quant'"),
    ({"activation": "dynamic"}, ConfigError, "format 'int' has no setting 'activation'"),
    ({"format": "int8", "activation": "dynamc"}, ConfigError, "activation must be None or one of .* Did you mean 'dynamic'"),
    ({"format": "int8", "activation": True}, ConfigError, "activation must be None or one of dynamic, static, got True"),
    ({"method": "smoothquant", "format": "int"}, ConfigError, "'smoothquant' is for quantized activations: it needs format 'int8'"),
    ({"method": "smoothquant", "smoothing": 2}, ConfigError, "smoothing must be 'search' or a number from 0 to 1, got 2"),
    ({"smoothing": 0.5}, ConfigError, "unknown setting 'smoothing' for method 'rtn'"),
    ({"method": "smoothquant", "overrides": {"a": {"activation": None}}}, ConfigError, r"overrides\['a'\]: method 'smoothquant' is for"),
    ({"quantize_embeddings": 1}, ConfigError, "quantize_embeddings must be True or False, got 1"),
    ({"quantize_lm_head": None}, ConfigError, "quantize_lm_head must be True or False, got None"),
    ({"dequantize": "no"}, ConfigError, "dequantize must be True or False, got 'no'"),
    ({"target_bits": 0}, ConfigError, "target_bits must be a number of bits above 0, such as 3.5, got 0"),
    ({"target_bits": "3"}, ConfigError, "target_bits must be a number .* got '3'"),
    ({"target_bits": 3.5, "format": "nf4"}, ConfigError, "target_bits needs a format with a choice of bits: 'int', got 'nf4'"),
    ({"candidate_bits": [2, 4]}, ConfigError, "give target_bits, too"),
    ({"target_bits": 3, "candidate_bits": [4, 4]}, ConfigError, r"list of different bits, got \[4, 4\]"),
    ({"target_bits": 3, "candidate_bits": [2, 9]}, ConfigError, "bits must be an integer from 2 to 8, got 9"),
    ({"kernel_mode": "exakt"}, ConfigError, "kernel_mode must be one of auto, exact, int8.* Did you mean 'exact'"),
    ({"modules_to_not_convert": "lm_head"}, ConfigError, "must be a list of module names, got 'lm_head'"),
    ({"modules_to_not_convert": [1]}, ConfigError, r"must be a list of module names, got \[1\]"),
    ({"modules_to_not_convert": 3}, ConfigError, "must be a list of module names, got 3"),
    ({"overrides": 3}, ConfigError, "overrides must be a dict of regex -> settings or None, got 3"),
    ({"overrides": ["lm_head"]}, ConfigError, "overrides must be a dict of regex"),
    ({"overrides": {"a(": None}}, ConfigError, r"overrides: 'a\(' is not a regular expression \("),
    ({"overrides": {1: None}}, ConfigError, "overrides: 1 is not a regular expression"),
    ({"overrides": {"a": 8}}, ConfigError, "expected a dict of settings or None for each pattern, got 8"),
    ({"overrides": {"a": {"bits": 9}}}, ConfigError, r"overrides\['a'\]: bits must be .* got 9"),
    ({"overrides": {"a": {"bit": 8}}}, ConfigError, r"overrides\['a'\]: unknown setting 'bit'.* Did you mean 'bits'"),
    ({"overrides": {"a": {"format": "nf5"}}}, UnknownNameError, r"overrides\['a'\]: unknown format 'nf5'"),
    ({"overrides": {"a": {"overrides": {}}}}, ConfigError, r"overrides\['a'\]: unknown setting 'overrides'"),
    ({"quant_method": "gptq"}, ConfigError, "expected quant_method 'hfq', got 'gptq'"),
    (
        {"format_version": FORMAT_VERSION + 1, "hfq_version": "9.0"},
        VersionError,
        rf"format version {FORMAT_VERSION + 1} \(written by hfq 9.0\).* pip install -U hfq",
    ),
    ({"format_version": "new"}, VersionError, "has format version 'new'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "error", "message"), WRONG)
def test_wrong_settings_are_answered(
    settings: dict[str, Any], error: type[HfqError], message: str
) -> None:
    with pytest.raises(error, match=message):
        HfqConfig(**settings)
    with pytest.raises(error, match=message):
        HfqConfig.from_dict(settings)


def test_the_docstring_names_every_setting_method_and_format() -> None:
    assert HfqConfig.__doc__ is not None
    settings = (*HfqConfig._settings(), *ALGORITHMS.names(), *FORMATS.names())
    options = [option for name in ALGORITHMS.names() for option in ALGORITHMS.get(name).options]
    for word in (*settings, *options):
        assert word in HfqConfig.__doc__, word
