"""Plain text tables and numbers for people: aligned, at most 100 columns wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

__all__ = [
    "WIDTH",
    "format_bytes",
    "format_row",
    "format_seconds",
    "format_table",
    "without_numbers",
    "wrapped",
]

WIDTH = 100  # columns
_GAP = "  "
_NARROWEST = 24  # columns that the last column keeps, whatever stands before it


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Rows of cells under a header, aligned by column; the last column wraps at `width`.

    A column of numbers is aligned to the right, any other to the left.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    used = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    widths[-1] = max(1, min(widths[-1], max(_NARROWEST, width - used)))
    right = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]
    rule = ["-" * size for size in widths]
    lines = [line for row in (header, rule, *rows) for line in _lines(row, widths, right)]
    return "\n".join(lines)


def format_row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    """One row of a table that is not complete yet.

    Args:
        widths: columns of each cell; only the last one wraps.
        right: cells that are aligned to the right.
    """
    return "\n".join(_lines(cells, widths, right))


def format_seconds(seconds: float) -> str:
    """``0.51`` -> ``0.5 s``, ``200`` -> ``3 min 20 s``, ``4000`` -> ``1 h 06 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def format_bytes(count: float) -> str:
    """``11547040`` -> ``11.5 MB``, in powers of 1000 as the Hub counts."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def wrapped(text: str, width: int = WIDTH) -> str:
    """A note as lines of at most `width` columns, all but the first indented."""
    return textwrap.fill(text, width, subsequent_indent=_GAP)


def without_numbers(name: str) -> str:
    """``model.layers.11.mlp`` -> ``model.layers.*.mlp``: the same for all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _lines(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    """One row as the lines that it takes: only its last cell can take more than one."""
    first, *rest = textwrap.wrap(row[-1], widths[-1]) or [""]
    cells = [*row[:-1], first]
    aligned = [
        cell.rjust(size) if flag else cell.ljust(size)
        for cell, size, flag in zip(cells, widths, right, strict=True)
    ]
    indent = " " * (sum(widths[:-1]) + len(_GAP) * (len(widths) - 1))
    return [_GAP.join(aligned).rstrip(), *(indent + line for line in rest)]


def _is_number(cell: str) -> bool:
    """Whether a cell starts like a number ("3.5 MB", "-1") or says that there is none."""
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()
