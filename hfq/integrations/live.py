"""The table that grows on a terminal while weights are calibrated."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..calibration.report import WeightReport
from ..calibration.run import Progress
from ..table import format_row, format_seconds

__all__ = ["live_table"]

_HEADER = ("weight", "error", "tokens", "damping", "time", "left")
_WIDTHS = (8, 9, 8, 10, 10)  # of all but the first column
_LONGEST_NAME = 48


@contextmanager
def live_table(names: Sequence[str], enabled: bool = True) -> Iterator[Progress | None]:
    """Within, a row on stderr for each weight that is done; None, and nothing is written, where that is no terminal.

    The time left follows from the cost of the weights that are done and of those that are not; forwards included.

    Args:
        names: of all weights to come.
        enabled: False: nothing is written anywhere.
    """
    if not enabled or not names or not sys.stderr.isatty():
        yield None
        return
    start = time.perf_counter()
    widths = min(max(map(len, (*names, _HEADER[0]))), _LONGEST_NAME), *_WIDTHS

    def row(cells: Sequence[str]) -> None:
        sys.stderr.write(format_row(cells, widths, [False, *[True] * len(_WIDTHS)]) + "\n")
        sys.stderr.flush()

    def show(report: WeightReport, done: float, left: float) -> None:
        name = report.name
        row(
            [
                name if len(name) <= widths[0] else "…" + name[1 - widths[0] :],
                "-" if report.error is None else f"{report.error:.2e}",
                str(report.tokens),
                f"{report.damping:g}",
                format_seconds(report.seconds),
                format_seconds((time.perf_counter() - start) * left / done),
            ]
        )

    row(_HEADER)
    row(["-" * width for width in widths])
    yield show
