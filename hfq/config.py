"""`HfqConfig`: what a user writes, validated once, and what a checkpoint's ``config.json`` keeps."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ._version import __version__
from .algorithms import find_method, method_names
from .core.checks import check_flag, check_integer
from .core.errors import ConfigError, HfqError, VersionError, nearest
from .core.spec import QuantSpec
from .formats import FORMAT_VERSION, FORMATS
from .nn.packed import KERNEL_MODES

__all__ = ["HfqConfig", "Recipe"]

# Settings that choose what is stored; each format takes the ones that it has.
_SPEC_SETTINGS = (
    "bits",
    "group_size",
    "sym",
    "scale_dtype",
    "static_groups",
    "double_quant",
    "activation",
    "stat_bits",
    "stat_group_size",
    "outliers",
)

# What `target_bits` chooses among: 5 to 7 bits cost almost as much as 8, and gain little over 4.
_CANDIDATES = (2, 3, 4, 8)

# Keys that `to_dict` writes beside the settings.
_METADATA = ("quant_method", "format_version", "hfq_version", "calibration")

# Regex -> changed settings, or None to keep what matches in float.
Overrides = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one weight is quantized and stored.

    Attributes:
        method, options: a method (see `hfq.algorithms.find_method`) and its own settings.
        format, spec: a registered packed layout and what it stores.
    """

    method: str
    options: Mapping[str, Any]
    format: str
    spec: QuantSpec

    @property
    def calibrated(self) -> bool:
        """Whether it needs data: for its method, or for a static scale of the activations."""
        return find_method(self.method).calibrated or self.spec.activation == "static"

    @property
    def sampled(self) -> bool:
        """Whether some of the activations themselves are needed, not only statistics of them."""
        return find_method(self.method).sampled or self.spec.activation == "static"


class HfqConfig(QuantizationConfigMixin):
    """Settings for ``from_pretrained(..., quantization_config=HfqConfig(...))``.

    Args:
        method: "rtn", "hqq" without data; "gptq", "spqr", "awq", "awq+gptq", "smoothquant", "smoothquant+gptq" with.
        format: a registered layout: "int", "nf4", "fp4", "int8", "fp8", "spqr". Default: the method's ("int"; "int8" for
            smoothquant, "spqr" for spqr).
        bits: 2 to 8 for "int" and "spqr"; the other formats fix it. Default 4 (8 for "int8" and "fp8", 3 for "spqr").
        group_size: columns that share a scale, -1 for whole rows. Default 128 ("int"), 64 ("nf4", "fp4"), 16 ("spqr").
        sym: no zero points. Default True, False for method "hqq" and format "spqr".
        scale_dtype: "float16" (default), "bfloat16" or "float32".
        static_groups: for "int": False lets groups follow the order in which gptq rounds columns; such weights decode on
            the slower PyTorch path. Default True: groups are runs of neighbours.
        double_quant: 8-bit scales, for "nf4" and "fp4".
        activation: for "int8" and "fp8": None keeps activations in float, "dynamic" rounds each token to int8 or to
            8-bit floats on the way in, "static" with one scale per weight that calibration finds. Default None ("dynamic"
            for smoothquant with "int8").
        stat_bits, stat_group_size: for "spqr": bits of scales and zero points, and how many rows share the float steps
            and offsets that turn them into numbers. Default 3 and 64.
        outliers: for "spqr": share of the weights that are stored beside the grid. Default 0.005.
        overrides: regex -> changed settings, or None to keep what matches in float. The regex is searched in the
            module's full name; the first that matches counts. An override that changes the format starts from
            that format's defaults. Stored as a list of pairs, because writers of JSON sort the keys of a dict.
        modules_to_not_convert: names that stay in float: a full name, or a trailing or inner part of it on
            dots ("lm_head", "mlp.gate", "layers.1").
        quantize_embeddings: pack the input embedding, and with it a tied head.
        quantize_lm_head: pack an untied output head.
        dataset: what methods with data calibrate on: a .txt, .jsonl or .parquet file, a name that the package "datasets"
            knows ("owner/name:config:split:column"), a list of texts, token tensors, or "self" (default): sequences
            sampled from the model. Not stored in checkpoints.
        tokenizer: for text: a tokenizer or its path. Default: the one beside the model. Not stored in checkpoints.
        num_samples, seqlen: how many sequences of how many tokens, at most. Default 128 of 2048, cut to the longest
            that the model takes.
        seed: of the choice among them, and of "self".
        target_bits: average bits per quantized weight, scales and zero points counted: each weight matrix gets its bits
            by what rounding it costs, measured on the data. Overrides that name bits or a format stay in force and
            count; embeddings and heads keep `bits`. The outcome stands in `overrides`, and this is None then.
        candidate_bits: bits to choose among. Default 2, 3, 4 and 8.
        kernel_mode: "auto", "exact" or "int8"; see `hfq.nn.packed.KERNEL_MODES`. Not stored in checkpoints.
        decode_kernels: norms, gates and the attention of one token run in native code as well, where the model's own code
            computes the same (see `hfq.integrations.decode`). Not stored in checkpoints.
        dequantize: load a packed checkpoint as a float model. Not stored in checkpoints.
        options: the method's own settings ("rtn": scale_search; "hqq": iterations; "gptq": damp_percent, desc_act,
            scale_search, refine, gptaq; "spqr": damp_percent, desc_act, refine; "awq": awq_steps, "smoothquant": smoothing, and
            those of what follows). They are explained in the method's file.

    Attributes:
        calibration: what a checkpoint tells about the data that it was calibrated with, else None.

    Raises:
        UnknownNameError: no such method or format.
        ConfigError: an unknown key, a value out of range, settings that contradict each other.
        VersionError: the dict comes from a newer format version.
    """

    def __init__(
        self,
        method: str = "rtn",
        *,
        format: str | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        scale_dtype: str | None = None,
        static_groups: bool | None = None,
        double_quant: bool | None = None,
        activation: str | None = None,
        stat_bits: int | None = None,
        stat_group_size: int | None = None,
        outliers: float | None = None,
        overrides: Overrides | Sequence[tuple[str, Mapping[str, Any] | None]] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        quantize_embeddings: bool = False,
        quantize_lm_head: bool = False,
        dataset: Any = None,
        tokenizer: Any = None,
        num_samples: int = 128,
        seqlen: int = 2048,
        seed: int = 0,
        target_bits: float | None = None,
        candidate_bits: Sequence[int] | None = None,
        kernel_mode: str = "auto",
        decode_kernels: bool = True,
        dequantize: bool = False,
        **options: Any,
    ) -> None:
        metadata = {key: options.pop(key) for key in _METADATA if key in options}
        _check_metadata(metadata)
        self.calibration: dict[str, Any] | None = metadata.get("calibration")
        # mypy: Transformers declares an enum of its own methods; it takes any string.
        self.quant_method = "hfq"  # type: ignore[assignment]
        self.method = method
        settings = {
            "format": format,
            "bits": bits,
            "group_size": group_size,
            "sym": sym,
            "scale_dtype": scale_dtype,
            "static_groups": static_groups,
            "double_quant": double_quant,
            "activation": activation,
            "stat_bits": stat_bits,
            "stat_group_size": stat_group_size,
            "outliers": outliers,
        }
        given = {key: value for key, value in settings.items() if value is not None}
        base = _recipe(method, {**_preferred(method, format), **given}, options, self._settings())
        self.format = base.format
        self.bits = base.spec.bits
        self.group_size = base.spec.group_size
        self.sym = base.spec.sym
        self.scale_dtype = base.spec.scale_dtype
        self.static_groups = base.spec.static_groups
        self.double_quant = bool(getattr(base.spec, "double_quant", False))
        self.activation = base.spec.activation
        self.stat_bits: int | None = getattr(base.spec, "stat_bits", None)
        self.stat_group_size: int | None = getattr(base.spec, "stat_group_size", None)
        self.outliers: float | None = getattr(base.spec, "outliers", None)
        self.options = dict(base.options)
        self.overrides = _overrides(overrides)
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.quantize_embeddings = check_flag("quantize_embeddings", quantize_embeddings)
        self.quantize_lm_head = check_flag("quantize_lm_head", quantize_lm_head)
        self.dataset, self.tokenizer = dataset, tokenizer
        self.num_samples = check_integer("num_samples", num_samples, 1)
        self.seqlen = check_integer("seqlen", seqlen, 2)
        self.seed = check_integer("seed", seed, 0)
        self.target_bits = _target_bits(target_bits, self.format)
        self.candidate_bits = _candidate_bits(candidate_bits, self.target_bits)
        self.kernel_mode = _choice("kernel_mode", kernel_mode, KERNEL_MODES)
        self.decode_kernels = check_flag("decode_kernels", decode_kernels)
        self.dequantize = check_flag("dequantize", dequantize)
        self._patterns = [
            (_compiled(pattern), self._override(pattern, changed))
            for pattern, changed in self.overrides.items()
        ]
        for bits in self.candidate_bits or ():
            self._changed({"bits": bits})
        if dataset is not None and not self.calibrated:
            raise ConfigError(
                f"dataset is given, but method {method!r} uses no data: leave it out, or choose a calibrated method "
                f"({', '.join(name for name in method_names() if find_method(name).calibrated)}) or activation='static'"
            )

    # ---- what happens to a module

    @property
    def calibrated(self) -> bool:
        """Whether any weight could be quantized with data."""
        if self.target_bits is not None:
            return True
        recipes = [self._changed({}), *(recipe for _, recipe in self._patterns)]
        return any(each.calibrated for each in recipes if each is not None)

    def recipe(self, name: str) -> Recipe | None:
        """The recipe of the module `name`, or None where it stays in float."""
        if self.skips(name):
            return None
        for pattern, recipe in self._patterns:
            if pattern.search(name):
                return recipe
        return self._changed({})

    def skips(self, name: str) -> bool:
        """Whether `modules_to_not_convert` names the module, by whole parts between dots."""
        padded = f".{name}."
        return any(f".{skipped}." in padded for skipped in self.modules_to_not_convert or ())

    def overridden(self, name: str) -> bool:
        """Whether an override asks for the module to be quantized, whatever the defaults say."""
        for pattern, recipe in self._patterns:
            if pattern.search(name):
                return recipe is not None
        return False

    def fixes_bits(self, name: str) -> bool:
        """Whether the bits of the module are no matter of `target_bits`: an override names them or a format."""
        changed = self.overrides.get(self._matching(name) or "") or {}
        return not {"bits", "format"}.isdisjoint(changed)

    def with_bits(self, bits: Mapping[str, int]) -> HfqConfig:
        """The config in which the modules of these names have these bits, whatever `target_bits` would choose.

        Names that differ by their first number only (that of the layer) share a pattern.
        """
        alike: dict[tuple[str, str | None, int], list[str]] = {}
        for name, count in bits.items():
            kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=1)
            alike.setdefault((kind, self._matching(name), count), []).append(name)
        allocated: dict[str, dict[str, Any] | None] = {
            _pattern(names): {**((pattern and self.overrides[pattern]) or {}), "bits": count}
            for (_, pattern, count), names in alike.items()
        }
        new = copy.copy(self)
        chosen = {"overrides": {**allocated, **self.overrides}, "target_bits": None}
        # The data has done its work; methods without data refuse one.
        new.update(**chosen, candidate_bits=None, dataset=None)
        return new

    def _matching(self, name: str) -> str | None:
        """The override that counts for a module."""
        return next((p.pattern for p, _ in self._patterns if p.search(name)), None)

    def _override(self, pattern: str, changed: Mapping[str, Any] | None) -> Recipe | None:
        try:
            return None if changed is None else self._changed(changed)
        except HfqError as err:
            raise type(err)(f"overrides[{pattern!r}]: {err}") from err

    def _changed(self, changed: Mapping[str, Any]) -> Recipe:
        """This config's recipe with some settings changed."""
        method = changed.get("method", self.method)
        same_method = method == self.method
        preferred = _preferred(method, changed.get("format", self.format if same_method else None))
        inherited: dict[str, Any] = {}
        if preferred["format"] == self.format:
            inherited = {key: getattr(self, key) for key in _SPEC_SETTINGS}
        settings = {**preferred, **inherited} if same_method else {**inherited, **preferred}
        options = dict(self.options) if same_method else {}
        for key, value in changed.items():
            if key in _SPEC_SETTINGS:
                settings[key] = value
            elif key not in ("method", "format"):
                options[key] = value
        return _recipe(method, settings, options, ("method", "format", *_SPEC_SETTINGS))

    # ---- JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `HfqConfig.from_dict` gives an equal config."""
        written = {
            "quant_method": self.quant_method,
            "format_version": FORMAT_VERSION,
            "hfq_version": __version__,
            "method": self.method,
            "format": self.format,
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "scale_dtype": self.scale_dtype,
            "overrides": [
                [pattern, _copied(changed)] for pattern, changed in self.overrides.items()
            ],
            "modules_to_not_convert": _names(self.modules_to_not_convert),
            "quantize_embeddings": self.quantize_embeddings,
            "quantize_lm_head": self.quantize_lm_head,
            **self.options,
        }
        if not self.static_groups:
            written["static_groups"] = False
        if self.double_quant:
            written["double_quant"] = True
        if self.activation is not None:
            written["activation"] = self.activation
        bilevel = {key: getattr(self, key) for key in ("stat_bits", "stat_group_size", "outliers")}
        written |= {key: value for key, value in bilevel.items() if value is not None}
        if self.calibrated:
            written |= {"num_samples": self.num_samples, "seqlen": self.seqlen, "seed": self.seed}
        if self.target_bits is not None:
            written |= {"target_bits": self.target_bits, "candidate_bits": self.candidate_bits}
        if self.calibration is not None:
            written["calibration"] = dict(self.calibration)
        return written

    def to_diff_dict(self) -> dict[str, Any]:
        """All settings: a checkpoint must not depend on the defaults of the release that reads it."""
        return self.to_dict()

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> HfqConfig | tuple[HfqConfig, dict[str, Any]]:
        """Build from the dict of a ``config.json``; unknown keys are errors.

        With `return_unused_kwargs` unknown `kwargs` come back instead, as in Transformers' other configs.
        """
        if not return_unused_kwargs:
            return cls(**{**config_dict, **kwargs})
        config = cls(**config_dict)
        return config, config.update(**kwargs)

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change settings, checked like those of a new config; returns what are no settings.

        Nothing has changed if that raises.
        """
        unwritten = {"dataset": self.dataset, "tokenizer": self.tokenizer}
        settings = {**self.to_dict(), **unwritten, **self.get_loading_attributes()}
        known = {
            key: value
            for key, value in kwargs.items()
            if key in settings or key in self._settings()
        }
        self.__dict__.update(type(self)(**{**settings, **known}).__dict__)
        return {key: value for key, value in kwargs.items() if key not in known}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """``dict(config)`` is ``config.to_dict()``."""
        yield from self.to_dict().items()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Settings of one load, which a caller may give for a checkpoint that has its own config."""
        return {
            "dequantize": self.dequantize,
            "kernel_mode": self.kernel_mode,
            "decode_kernels": self.decode_kernels,
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfqConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.to_dict().items() if k not in _METADATA)
        return f"HfqConfig({settings})"

    @classmethod
    def _settings(cls) -> tuple[str, ...]:
        """The names of all settings that do not belong to one method."""
        parameters = inspect.signature(cls).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def _preferred(method: str, format: str | None) -> dict[str, Any]:
    """A format and the settings that the method prefers with it."""
    defaults = find_method(method).defaults
    return dict(defaults) if format in (None, defaults["format"]) else {"format": format}


def _recipe(
    method: str, settings: Mapping[str, Any], options: Mapping[str, Any], known: tuple[str, ...]
) -> Recipe:
    """Check a method, its options and the settings of its format against each other.

    Args:
        settings: "format" and what it stores.
        known: names to suggest for an unknown option, beside the method's own.
    """
    found = find_method(method)
    for key in options:
        if key not in found.options:
            names = [*known, *found.options]
            raise ConfigError(
                f"unknown setting {key!r} for method {method!r}: expected one of {', '.join(names)}."
                f"{nearest(key, names)}"
            )
    stored = {key: value for key, value in settings.items() if key != "format"}
    for key, usual in (("double_quant", False), ("static_groups", True)):
        if stored.get(key) is usual:
            # What a format without it does anyway.
            del stored[key]
    spec = FORMATS.get(settings["format"]).spec(stored)
    merged = {**found.options, **options}
    found.check(spec, merged)
    return Recipe(method=method, options=merged, format=settings["format"], spec=spec)


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    method = metadata.get("quant_method", "hfq")
    if method != "hfq":
        raise ConfigError(
            f"expected quant_method 'hfq', got {method!r}: this config belongs to another quantizer"
        )
    version = metadata.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise VersionError(
            f"this checkpoint has format version {version!r} (written by hfq {metadata.get('hfq_version', '?')}), "
            f"hfq {__version__} reads versions up to {FORMAT_VERSION}: upgrade with pip install -U hfq"
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as err:
        raise ConfigError(f"overrides: {pattern!r} is not a regular expression ({err})") from err


def _overrides(
    overrides: Overrides | Sequence[tuple[str, Mapping[str, Any] | None]] | None,
) -> dict[str, dict[str, Any] | None]:
    """A dict, or the list of pairs that `to_dict` writes, as a dict."""
    try:
        pairs = dict(overrides or {})
    except (TypeError, ValueError) as err:
        raise ConfigError(
            f"overrides must be a dict of regex -> settings or None, got {overrides!r}"
        ) from err
    return {pattern: _copied(changed) for pattern, changed in pairs.items()}


def _copied(changed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if changed is None:
        return None
    if not isinstance(changed, Mapping):
        raise ConfigError(
            f"overrides: expected a dict of settings or None for each pattern, got {changed!r}"
        )
    # None takes the default, but of the activations' settings it is one: to keep them in float.
    return {k: value for k, value in changed.items() if value is not None or k == "activation"}


def _names(names: Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"modules_to_not_convert must be a list of module names, got {names!r}")
    return list(names)


def _target_bits(value: object, format: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 16:
        raise ConfigError(
            f"target_bits must be a number of bits above 0, such as 3.5, got {value!r}"
        )
    if format != "int":
        raise ConfigError(
            f"target_bits needs a format with a choice of bits: 'int', got {format!r}"
        )
    return float(value)


def _candidate_bits(values: object, target: float | None) -> list[int] | None:
    if target is None:
        if values is not None:
            raise ConfigError(
                "candidate_bits is what target_bits chooses among: give target_bits, too"
            )
        return None
    if values is None:
        return list(_CANDIDATES)
    if not isinstance(values, (list, tuple)) or not values or len(set(values)) < len(values):
        raise ConfigError(f"candidate_bits must be a list of different bits, got {values!r}")
    return sorted(check_integer("candidate_bits: each", value, 2) for value in values)


def _pattern(names: Sequence[str]) -> str:
    """A regex that matches exactly these names, which differ by one part between dots."""
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    distinct = [list(dict.fromkeys(map(re.escape, column))) for column in columns]
    parts = [each[0] if len(each) == 1 else f"(?:{'|'.join(each)})" for each in distinct]
    return "^" + r"\.".join(parts) + "$"


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(
            f"{key} must be one of {', '.join(allowed)}, got {value!r}.{nearest(str(value), allowed)}"
        )
    return value
