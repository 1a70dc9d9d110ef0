"""Quantize a model, save it packed, and check what was saved."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..core.errors import CheckpointError, ConfigError, UnknownNameError
from ..table import format_bytes, format_table
from .command import Result, UsageError, add_loading, load_model, quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..config import HfqConfig
    from ..evaluation import WeightSize
    from ..integrations.transformers import HfqQuantizer

NAME = "quantize"

_GATE_TOKENS = 16
# Reloading gives the same codes to the same kernels. What is left is the order of sums, which a library may choose
# anew each time; a wrong tensor moves logits by orders of magnitude more.
_GATE_TOLERANCE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a float model")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder to save into")
    parser.add_argument("--method", default="rtn", help="rtn, hqq, gptq (default: rtn)")
    parser.add_argument("--format", help="int, nf4, fp4, int8 (default: the method's)")
    parser.add_argument("--bits", type=int, help="2 to 8 (default: the format's)")
    parser.add_argument("--group-size", type=int, help="columns that share a scale; -1: whole rows")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--sym", action="store_true", default=None, help="no zero points")
    grid.add_argument("--asym", action="store_false", dest="sym", help="a zero point per group")
    parser.add_argument("--scale-dtype", help="float16, bfloat16, float32")
    parser.add_argument(
        "--double-quant", action="store_true", default=None, help="8-bit scales (nf4, fp4)"
    )
    parser.add_argument(
        "--scale-search",
        action=argparse.BooleanOptionalAction,
        help="least squares grids (rtn: off by default, gptq: on)",
    )
    parser.add_argument("--iterations", type=int, help="optimisation steps (hqq)")
    parser.add_argument(
        "--quantize-embeddings", action="store_true", help="pack the input embedding"
    )
    parser.add_argument("--quantize-lm-head", action="store_true", help="pack the output head")
    parser.add_argument(
        "--override",
        metavar="REGEX=JSON",
        action="append",
        default=[],
        help="other settings for matching modules, or null to keep them in float; repeatable",
    )
    parser.add_argument(
        "--skip",
        metavar="NAME",
        action="append",
        help="keep modules of that name in float; repeatable",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload to this repository")
    _add_calibration(parser.add_argument_group("calibration (gptq)"))
    add_loading(parser)


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        metavar="FILE",
        help=".txt, .jsonl or .parquet file (default: text that the model writes itself)",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="(default: the model's)")
    group.add_argument("--num-samples", type=int, default=128, help="sequences (default: 128)")
    group.add_argument("--seqlen", type=int, default=2048, help="tokens in each (default: 2048)")
    group.add_argument("--seed", type=int, default=0, help="of their choice (default: 0)")
    group.add_argument(
        "--desc-act",
        action=argparse.BooleanOptionalAction,
        help="round columns with large activations first (default: on)",
    )
    group.add_argument("--damp-percent", type=float, help="share of the diagonal (default: 0.01)")
    group.add_argument("--gptaq", type=float, help="share of input drift made good (default: 0)")


def run(args: argparse.Namespace) -> Result:
    from ..integrations.hub import push_to_hub
    from ..integrations.staging import staged

    config = _config(args)
    output = Path(args.output)
    if output.exists() and Path(args.model).exists() and output.samefile(args.model):
        raise UsageError(f"--output {args.output} is the model itself: give another folder")
    _check_float(args.model)
    start = time.perf_counter()
    # Everything is written beside the output's old files, loaded from there and compared, and only then moved.
    with staged(output) as new:
        report, logits = _quantize(new, output, config, args)
        report["logit_difference"] = _gate(logits, new, args)
    report["seconds"] = time.perf_counter() - start
    if args.push_to_hub:
        report["pushed_to"] = push_to_hub(output, args.push_to_hub).commit_url
    return Result(data=report, text=_table(report))


# ---- settings


def _config(args: argparse.Namespace) -> HfqConfig:
    from ..config import HfqConfig

    names = ("scale_search", "iterations", "desc_act", "damp_percent", "gptaq")
    options = {name: getattr(args, name) for name in names}
    try:
        return HfqConfig(
            method=args.method,
            format=args.format,
            bits=args.bits,
            group_size=args.group_size,
            sym=args.sym,
            scale_dtype=args.scale_dtype,
            double_quant=args.double_quant,
            overrides=dict(map(_override, args.override)),
            modules_to_not_convert=args.skip,
            quantize_embeddings=args.quantize_embeddings,
            quantize_lm_head=args.quantize_lm_head,
            dataset=args.dataset,
            tokenizer=args.tokenizer,
            num_samples=args.num_samples,
            seqlen=args.seqlen,
            seed=args.seed,
            **{key: value for key, value in options.items() if value is not None},
        )
    except (ConfigError, UnknownNameError) as error:
        raise UsageError(str(error)) from error


def _override(text: str) -> tuple[str, dict[str, Any] | None]:
    """``REGEX=JSON`` cut at the first ``=`` that leaves JSON behind: a regex may hold one, too."""
    cuts = (index for index, letter in enumerate(text) if letter == "=")
    for cut in cuts:
        try:
            changed = json.loads(text[cut + 1 :])
        except json.JSONDecodeError:
            continue
        return text[:cut], changed
    raise UsageError(
        f"--override: expected REGEX=JSON such as 'lm_head=null' or 'down_proj={{\"bits\": 8}}', got {text!r}"
    )


def _check_float(path: str) -> None:
    """Refuse what is quantized already, before anything is loaded."""
    from transformers import AutoConfig

    quiet_libraries()
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        method = (
            settings.get("quant_method") if isinstance(settings, dict) else type(settings).__name__
        )
        raise CheckpointError(
            f"{path} is quantized already (by {method}): start from the float model"
        )


# ---- saving


def _quantize(
    new: Path, output: Path, config: HfqConfig, args: argparse.Namespace
) -> tuple[dict[str, Any], Tensor]:
    """Quantize into the folder `new`, which will be `output`; the report and some logits.

    The model is gone when this returns: it need not stay in memory beside the reloaded one.
    """
    from ..integrations.card import CARD, has_foreign_card, model_card

    model = load_model(args.model, args, quantization_config=config)
    logits = _probe(model)
    model.save_pretrained(new)
    _save_tokenizer(args.model, new)
    # The card that the model wrote bears the staging folder's name.
    (new / CARD).unlink()
    if not has_foreign_card(output):
        card = model_card(model, name=output.absolute().name, command=_command(args))
        (new / CARD).write_text(str(card), encoding="utf-8")
    return _report(model, config, args), logits


def _gate(expected: Tensor, folder: Path, args: argparse.Namespace) -> float:
    """Load what was saved; the largest difference of its logits, over the largest logit."""
    logits = _probe(load_model(str(folder), args))
    if logits.equal(expected):
        return 0.0
    difference = ((logits - expected).abs().amax() / expected.abs().amax()).item()
    # Written so that a NaN fails.
    if not difference <= _GATE_TOLERANCE:
        raise CheckpointError(
            f"the saved model does not reproduce the quantized one: logits differ by {difference:.1e} of the largest, "
            f"expected at most {_GATE_TOLERANCE}; nothing was kept. Please report this model"
        )
    return float(difference)


def _probe(model: PreTrainedModel) -> Tensor:
    """Logits float32 `[T, V]` of a few random tokens."""
    import torch

    from ..evaluation.logits import window_logits

    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, _GATE_TOKENS), generator=generator)
    return window_logits(model, ids, "the quantized model")[0].float().cpu()


def _save_tokenizer(source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return  # a model without a tokenizer is saved without one
    tokenizer.save_pretrained(folder)


# ---- words


def _command(args: argparse.Namespace) -> str:
    return shlex.join(["hfq", *args.words])


def _report(model: PreTrainedModel, config: HfqConfig, args: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation import weight_size

    size = weight_size(model)
    quantizer = cast("HfqQuantizer", model.hf_quantizer)
    selection, calibration = quantizer.selection, quantizer.calibration
    return {
        "model": args.model,
        "output": args.output,
        "settings": config.to_dict(),
        "bytes_before": _float_bytes(model, size),
        "bytes_after": size.total_bytes,
        "bits_per_weight": size.bits_per_weight,
        "quantized": sum(len(weights) for weights in selection.recipes.values()),
        "kept": selection.kept,
        "calibration": None if calibration is None else calibration.to_dict(),
    }


def _float_bytes(model: PreTrainedModel, size: WeightSize) -> int:
    """Bytes of the same weights in the model's dtype."""
    return size.kept_bytes + size.packed_weights * model.dtype.itemsize


def _table(report: dict[str, Any]) -> str:
    quantized, kept = report["quantized"], report["kept"]
    reasons = [f"kept {count}: {why}" for why, count in Counter(kept.values()).most_common()]
    before, after = report["bytes_before"], report["bytes_after"]
    rows = [
        ["weights", f"quantized {quantized} of {quantized + len(kept)}"],
        *(["", reason] for reason in reasons),
        ["size", f"{format_bytes(before)} -> {format_bytes(after)} ({after / before:.0%})"],
        ["bits per weight", f"{report['bits_per_weight']:.2f}"],
        ["saved and reloaded", _gate_result(report["logit_difference"])],
        ["time", f"{report['seconds']:.1f} s"],
        ["output", report["output"]],
    ]
    if "pushed_to" in report:
        rows.append(["pushed to", report["pushed_to"]])
    return format_table(["model", report["model"]], rows)


def _gate_result(difference: float) -> str:
    return f"logits differ by {difference:.1e} of the largest" if difference else "identical logits"
