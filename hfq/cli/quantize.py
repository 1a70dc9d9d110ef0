"""Quantize a model, save it packed, and check what was saved."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, UnknownNameError
from .command import Result, UsageError, add_loading, launched, quiet_libraries

if TYPE_CHECKING:
    from ..config import HfqConfig

NAME = "quantize"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a float model")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder to save into")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload to this repository")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with an unfinished run in OUT (default), or delete it",
    )
    add_settings(parser)
    add_loading(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Flags of `HfqConfig`; ``hfq plan`` has the same."""
    parser.add_argument(
        "--method",
        default="rtn",
        help="rtn, hqq, gptq, spqr, awq, awq+gptq, smoothquant (default: rtn)",
    )
    parser.add_argument("--format", help="int, nf4, fp4, int8, fp8, spqr (default: the method's)")
    parser.add_argument("--bits", type=int, help="2 to 8 (default: the format's)")
    parser.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="average bits per weight, scales included; shared out by what rounding costs (needs --dataset)",
    )
    parser.add_argument(
        "--candidate-bits",
        type=int,
        nargs="+",
        metavar="BITS",
        help="what --target-bits chooses among (default: 2 3 4 8)",
    )
    parser.add_argument("--group-size", type=int, help="columns that share a scale; -1: whole rows")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--sym", action="store_true", default=None, help="no zero points")
    grid.add_argument("--asym", action="store_false", dest="sym", help="a zero point per group")
    _add_spqr(parser.add_argument_group("format spqr"))
    parser.add_argument("--scale-dtype", help="float16, bfloat16, float32")
    parser.add_argument(
        "--no-static-groups",
        action="store_false",
        dest="static_groups",
        default=None,
        help="groups follow the order of rounding (gptq, int)",
    )
    parser.add_argument(
        "--double-quant", action="store_true", default=None, help="8-bit scales (nf4, fp4)"
    )
    parser.add_argument(
        "--scale-search",
        action=argparse.BooleanOptionalAction,
        help="least squares grids (rtn: off by default, gptq: on)",
    )
    parser.add_argument(
        "--activation", help="dynamic, static: 8-bit activations, too (int8, fp8; default: float)"
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
    _add_calibration(
        parser.add_argument_group("calibration (gptq, spqr, awq, smoothquant, static, target-bits)")
    )


def _add_spqr(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--stat-bits", type=int, help="of scales and zero points (default: 3)")
    group.add_argument(
        "--stat-group-size", type=int, help="rows that share their steps and offsets (default: 64)"
    )
    group.add_argument(
        "--outliers", type=float, metavar="SHARE", help="of the weights (default: 0.005)"
    )


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        metavar="DATA",
        help=".txt, .jsonl or .parquet file, or a name of the Hub as owner/name:config:split:column (default: text "
        "sampled from the model)",
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
    group.add_argument(
        "--refine",
        type=int,
        help="second looks at grids and codes (gptq: 1, below 4 bits 2; spqr: 2)",
    )
    group.add_argument("--gptaq", type=float, help="share of input drift made good (default: 0)")
    group.add_argument(
        "--smoothing",
        type=_smoothing,
        help="share of the activations' range that weights take over, 0 to 1, or search (default: search)",
    )


def run(args: argparse.Namespace) -> Result:
    from ..integrations.hub import push_to_hub
    from ..integrations.streaming import quantize

    config = config_of(args)
    folders = Path(args.output), Path(args.model)
    if all(folder.exists() for folder in folders) and os.path.samefile(*folders):
        raise UsageError(f"--output {args.output} is the model itself: give another folder")
    quiet_libraries()
    with launched() as rank:
        report = quantize(
            args.model,
            args.output,
            config,
            resume=args.resume,
            dtype=args.dtype,
            device=_device(args.device),
            command=shlex.join(["hfq", *args.words]),
        )
    if rank:
        return Result(data={}, text="", silent=True)
    data, text = report.to_dict(), report.table()
    if args.push_to_hub:
        data["pushed_to"] = push_to_hub(args.output, args.push_to_hub).commit_url
        text += f"\npushed to {data['pushed_to']}"
    return Result(data=data, text=text)


def _device(name: str | None) -> str:
    """Of several processes on a machine each takes a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name or "cpu"


# ---- settings


def config_of(args: argparse.Namespace) -> HfqConfig:
    """From the flags of `add_settings`.

    Raises:
        UsageError: they contradict each other, or are unknown.
    """
    from ..config import HfqConfig

    names = (
        "scale_search",
        "iterations",
        "desc_act",
        "damp_percent",
        "refine",
        "gptaq",
        "smoothing",
    )
    options = {name: getattr(args, name) for name in names}
    try:
        return HfqConfig(
            method=args.method,
            format=args.format,
            bits=args.bits,
            group_size=args.group_size,
            sym=args.sym,
            scale_dtype=args.scale_dtype,
            static_groups=args.static_groups,
            double_quant=args.double_quant,
            activation=args.activation,
            stat_bits=args.stat_bits,
            stat_group_size=args.stat_group_size,
            outliers=args.outliers,
            overrides=dict(map(_override, args.override)),
            modules_to_not_convert=args.skip,
            quantize_embeddings=args.quantize_embeddings,
            quantize_lm_head=args.quantize_lm_head,
            dataset=args.dataset,
            tokenizer=args.tokenizer,
            num_samples=args.num_samples,
            seqlen=args.seqlen,
            seed=args.seed,
            target_bits=args.target_bits,
            candidate_bits=args.candidate_bits,
            **{key: value for key, value in options.items() if value is not None},
        )
    except (ConfigError, UnknownNameError) as error:
        raise UsageError(str(error)) from error


def _smoothing(text: str) -> float | str:
    """A number, or a word for `HfqConfig` to judge."""
    try:
        return float(text)
    except ValueError:
        return text


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
