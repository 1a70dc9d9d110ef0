"""Say what quantize would do: weights, kernels, sizes, time and memory; nothing is written."""

from __future__ import annotations

import argparse

from . import quantize
from .command import Result, add_loading, quiet_libraries

NAME = "plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a float model")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="where it would be saved, to check the space there"
    )
    quantize.add_settings(parser)
    add_loading(parser)


def run(args: argparse.Namespace) -> Result:
    from ..integrations.plan import plan

    config = quantize.config_of(args)
    quiet_libraries()
    found = plan(
        args.model, config, output=args.output, dtype=args.dtype, device=args.device or "cpu"
    )
    return Result(data=found.to_dict(), text=found.table())
