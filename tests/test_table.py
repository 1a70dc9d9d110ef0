"""Plain text tables."""

from __future__ import annotations

import pytest

from hfq.table import (
    format_bytes,
    format_row,
    format_seconds,
    format_table,
    without_numbers,
    wrapped,
)


def test_columns_are_aligned_by_kind():
    table = format_table(["name", "size"], [["a", "1.0 kB"], ["longer", "12.0 kB"], ["c", "-"]])
    assert table.splitlines() == [
        "name       size",
        "------  -------",
        "a        1.0 kB",
        "longer  12.0 kB",
        "c             -",
    ]


def test_the_last_column_wraps():
    words = " ".join(["word"] * 60)
    lines = format_table(["a", "b"], [["x" * 30, words]]).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) > 4
    assert " ".join(" ".join(lines[2:]).replace("x", "").split()) == words
    assert all(line.startswith(" " * 32) for line in lines[3:])


def test_a_last_column_of_nothing():
    assert format_table(["a", ""], [["b", ""]]).splitlines() == ["a", "-  -", "b"]


def test_a_table_without_rows():
    assert format_table(["a", "b"], []).splitlines() == ["a  b", "-  -"]


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        format_table(["a", "b"], [["x"]])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (11547040, "11.5 MB"),
        (14e9, "14.0 GB"),
        (2e15, "2000.0 TB"),
    ],
)
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.11.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("h.0", "h.*"),
        ("a.1.2.b", "a.*.*.b"),
        ("fc1", "fc1"),
        ("conv2d.w8", "conv2d.w8"),
    ],
)
def test_layer_numbers(name, pattern):
    assert without_numbers(name) == pattern


def test_long_notes():
    lines = wrapped("word " * 50).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 100
    assert lines[1].startswith("  word")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.51, "0.5 s"),
        (59.9, "59.9 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (4e5, "111 h 06 min"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_a_row_alone():
    assert format_row(["a", "1"], [3, 4], [False, True]) == "a       1"
