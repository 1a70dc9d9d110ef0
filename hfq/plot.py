"""Small pictures of numbers, as SVG, without a plotting library: lines over a log axis, bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bars", "Series", "bars", "log_plot"]

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 45
# Of bars: room for their names and for their numbers, and how far apart they lie.
_NAMES, _NUMBERS, _STEP = 150, 70, 18
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


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Attributes:
    name: above the bars.
    values: name of each bar and its number, 0 or more.
    """

    name: str
    values: Sequence[tuple[str, float]]


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

    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts = _paper(_HEIGHT, _LEFT, title)
    parts.append(_text(middle, _HEIGHT - 10, x_label, anchor="middle"))
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
        parts.append(_rect(_WIDTH - _RIGHT + 14, y - 8, 10, 10, colour))
        parts.append(_text(_WIDTH - _RIGHT + 30, y + 1, each.name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def bars(
    title: str, x_label: str, groups: Sequence[Bars], *, form: str = ".1f", full: float = 0.0
) -> str:
    """The text of an SVG file: horizontal bars from 0, in groups. A name has one colour in all.

    Args:
        groups: at least one, each with a bar; all numbers finite.
        form: the format of the numbers at the ends of the bars.
        full: what a bar of the whole width stands for (more where a number is larger). 0: in each
            group its largest number.
    """
    largest = max(value for group in groups for _, value in group.values)
    whole = [
        max(full, largest) if full else max(value for _, value in group.values) for group in groups
    ]
    names = list(dict.fromkeys(name for group in groups for name, _ in group.values))
    count = sum(len(group.values) + 1.5 for group in groups)  # a heading and half a step between
    height = round(_TOP + count * _STEP + 28)
    width = _WIDTH - _NAMES - _NUMBERS

    parts = _paper(height, 20, title)
    parts.append(_text(_NAMES + width / 2, height - 12, x_label, anchor="middle"))
    y: float = _TOP
    for group, most in zip(groups, whole, strict=True):
        y += _STEP
        parts.append(_text(20, y - 4, group.name, size=13))
        top = y
        for name, value in group.values:
            length = value / most * width if most else 0.0
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            parts.append(_text(_NAMES - 8, y + 13, name, anchor="end"))
            parts.append(_rect(_NAMES, y + 3, length, _STEP - 4, colour))
            parts.append(_text(_NAMES + length + 6, y + 13, format(value, form)))
            y += _STEP
        parts.append(
            f'<line x1="{_NAMES}" x2="{_NAMES}" y1="{top:.1f}" y2="{y:.1f}" stroke="#888"/>'
        )
        y += _STEP / 2
    return "\n".join([*parts, "</svg>"]) + "\n"


def _paper(height: int, left: int, title: str) -> list[str]:
    """What every picture begins with."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(left, 22, title, size=14),
    ]


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
