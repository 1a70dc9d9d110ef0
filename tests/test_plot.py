"""The pictures are SVG files that show what they were given."""

from __future__ import annotations

import importlib.util
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from hfq.plot import Bars, Series, bars, log_plot

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"


def parsed(picture: str) -> ElementTree.Element:
    root = ElementTree.fromstring(picture)
    assert root.tag == f"{SVG}svg"
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def bars_of(root: ElementTree.Element) -> list[tuple[float, str]]:
    """Widths and colours, without the paper."""
    _paper, *found = root.iter(f"{SVG}rect")
    return [(float(rect.attrib["width"]), rect.attrib["fill"]) for rect in found]


# ---- lines


def test_lines_go_through_their_points() -> None:
    series = [
        Series(name="a & b", points=[(0, 1.0), (1, 10.0), (2, 100.0)]),
        Series(name="other", points=[(1, 0.5)]),
    ]
    root = parsed(log_plot("<title>", "block", series))
    assert {"<title>", "block", "a & b", "other", "1e-1", "1e0", "1e1", "1e2"} <= set(texts(root))
    line = next(root.iter(f"{SVG}polyline"))
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    across, up = [x for x, _ in points], [y for _, y in points]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert up[0] - up[1] == pytest.approx(up[1] - up[2], abs=0.2) and up[0] > up[2]


# ---- bars


def test_bars_are_as_long_as_their_numbers() -> None:
    groups = [
        Bars(name="fast", values=[("ours", 400.0), ("a < b", 100.0)]),
        Bars(name="slow", values=[("ours", 3.0), ("a < b", 4.0), ("third", 0.0)]),
    ]
    root = parsed(bars("title & more", "tokens per second", groups))
    shown = texts(root)
    assert {"title & more", "tokens per second", "fast", "slow", "400.0", "100.0"} <= set(shown)
    assert shown.index("fast") < shown.index("400.0") < shown.index("slow") < shown.index("3.0")
    assert shown.count("ours") == shown.count("a < b") == 2
    (ours, blue), (theirs, red), (ours_2, blue_2), (theirs_2, red_2), (nothing, _) = bars_of(root)
    # Each group to its own scale.
    assert ours == theirs_2 and nothing == 0
    assert theirs / ours == pytest.approx(0.25, abs=1e-3)
    assert ours_2 / theirs_2 == pytest.approx(0.75, abs=1e-3)
    assert blue == blue_2 != red == red_2


def test_bars_of_one_scale() -> None:
    groups = [Bars(name="a", values=[("x", 0.5)]), Bars(name="b", values=[("x", 0.25)])]
    root = parsed(bars("", "", groups, form=".0%", full=1.0))
    (half, _), (quarter, _) = bars_of(root)
    (whole, _), _ = bars_of(parsed(bars("", "", groups)))
    assert half / whole == pytest.approx(0.5, abs=1e-3)
    assert quarter / whole == pytest.approx(0.25, abs=1e-3)
    assert {"50%", "25%"} <= set(texts(root))


def test_bars_never_leave_the_picture() -> None:
    groups = [Bars(name="a", values=[("x", 2.0)]), Bars(name="b", values=[("x", 1.0)])]
    (more, _), (full, _) = bars_of(parsed(bars("", "", groups, full=1.0)))
    (whole, _), _ = bars_of(parsed(bars("", "", groups)))
    assert more == whole and full / whole == pytest.approx(0.5, abs=1e-3)


def test_bars_of_nothing_but_zeros() -> None:
    picture = bars("", "", [Bars(name="a", values=[("x", 0.0), ("y", 0.0)])])
    assert [width for width, _ in bars_of(parsed(picture))] == [0, 0]
    assert "nan" not in picture


# ---- what the benchmark draws


@pytest.mark.parametrize("part", ["kernels", "models"])
def test_committed_pictures_are_those_of_the_committed_numbers(part: str) -> None:
    spec = importlib.util.spec_from_file_location("cpu_benchmark", BENCHMARKS / "cpu.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = json.loads((BENCHMARKS / "results" / f"cpu_{part}.json").read_text())[part]
    picture = getattr(benchmark, f"draw_{part}")(found)
    assert picture == (BENCHMARKS / "results" / f"cpu_{part}.svg").read_text(encoding="utf-8")
    shown = texts(parsed(picture))
    if part == "models":
        for task in benchmark.TASKS:
            first = shown[shown.index(task) + 1]
            assert first.startswith("hfq")
        numbers = [one["tokens_per_second"].values() for one in found.values()]
        assert {f"{number:.1f}" for row in numbers for number in row} <= set(shown)
    else:
        shares = [row["share_of_read_bandwidth"] for row in found["rows"] if row["tokens"] == 1]
        assert all(math.isfinite(share) for share in shares)
        assert {f"{share:.0%}" for share in shares} <= set(shown)
