"""Say what this installation has, what is missing or broken, and the remedy."""

from __future__ import annotations

import argparse

from .command import Result

NAME = "doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bandwidth", action="store_true", help="also measure how fast memory is read"
    )


def run(args: argparse.Namespace) -> Result:
    from ..diagnose import doctor

    diagnosis = doctor(bandwidth=args.bandwidth)
    return Result(data=diagnosis.to_dict(), text=diagnosis.table(), failed=not diagnosis.ok)
