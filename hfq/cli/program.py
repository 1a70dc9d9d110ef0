"""Parse the command line, run one command, say what came of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from .._version import __version__
from ..core.errors import HfqError
from . import doctor, evaluate, explain, inspect, plan, push, quantize
from .command import Result, UsageError

__all__ = ["main"]

_COMMANDS = (quantize, plan, evaluate, inspect, explain, doctor, push)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hfq`` with the given words (default: the process's); returns the exit code.

    Raises:
        SystemExit: after ``--help`` and ``--version`` (0) and after bad usage (2), as argparse does.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(words)
    args.words = words
    try:
        # Whatever libraries print belongs beside the result, not into it.
        with contextlib.redirect_stdout(sys.stderr):
            result: Result = args.run(args)
    except UsageError as error:
        args.parser.error(_one_line(error))
    except (HfqError, OSError, MemoryError, ImportError) as error:
        if args.traceback:
            traceback.print_exc()
        print(f"hfq: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hfq: interrupted", file=sys.stderr)
        return 130
    if not result.silent:
        _print(json.dumps(_finite(result.data), indent=2) if args.json else result.text)
    return 1 if result.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfq", description="Quantized weights for Transformers models."
    )
    parser.add_argument("--version", action="version", version=f"hfq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        summary = (command.__doc__ or "").splitlines()[0]
        added = commands.add_parser(command.NAME, help=summary, description=summary)
        command.add_arguments(added)
        added.add_argument("--json", action="store_true", help="print one JSON object")
        added.add_argument(
            "--traceback", action="store_true", help="show where a failure came from"
        )
        added.set_defaults(run=command.run, parser=added)
    return parser


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
