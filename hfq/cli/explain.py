"""Name the kernel of every packed weight, and why no other one was taken."""

from __future__ import annotations

import argparse

from .command import Result, add_loading, load_model

NAME = "explain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a quantized model")
    add_loading(parser)


def run(args: argparse.Namespace) -> Result:
    from ..diagnose import explain

    explanation = explain(load_model(args.model, args))
    return Result(data=explanation.to_dict(), text=explanation.table())
