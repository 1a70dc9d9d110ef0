"""A small picture of numbers: lines over a logarithmic axis, as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "log_plot"]

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 45
# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


@dataclass(frozen=True, kw_only=True)
class Series:
    """Attributes:
    name: in the legend.
    points: (x, y), y above 0.
    """

    name: str
    points: Sequence[tuple[float, float]]


def log_plot(title: str, x_label: str, series: Sequence[Series]) -> str:
    """The text of an SVG file. At least one series with one point; all y finite and above 0."""
    xs = [x for each in series for x, _ in each.points]
    ys = [math.log10(y) for each in series for _, y in each.points]
    low, high = math.floor(min(ys)), math.ceil(max(ys))
    high = max(high, low + 1)
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def across(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def up(log_y: float) -> float:
        return _HEIGHT - _BOTTOM - (log_y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 22, title, size=14),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label, anchor="middle"),
    ]
    for power in range(low, high + 1):
        y = up(power)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(_LEFT - 8, y + 4, f"1e{power}", anchor="end"))
    step = max(1, round((right - left) / 8))
    for x in range(math.ceil(left), math.floor(right) + 1, step):
        parts.append(_text(across(x), _HEIGHT - _BOTTOM + 18, str(x), anchor="middle"))
    for index, each in enumerate(series):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [(across(x), up(math.log10(y))) for x, y in each.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        y = _TOP + 16 * index
        parts.append(
            f'<rect x="{_WIDTH - _RIGHT + 14}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
        )
        parts.append(_text(_WIDTH - _RIGHT + 30, y + 1, each.name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
