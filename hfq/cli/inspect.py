"""List what a checkpoint folder holds and check that it is whole; no tensor is read."""

from __future__ import annotations

import argparse

from .command import Result

NAME = "inspect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint folder")


def run(args: argparse.Namespace) -> Result:
    from ..inspection import inspect_checkpoint

    summary = inspect_checkpoint(args.path)
    return Result(data=summary.to_dict(), text=summary.table())
