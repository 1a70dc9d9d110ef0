"""Data sets to tokens."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from hfq.core.errors import ConfigError
from hfq.tokens import choose, sequences, token_stream, windows


def by_letter():
    """A tokenizer that starts each text with 0 and gives each letter its code."""
    return lambda text: [0, *map(ord, text)]


def test_a_text_file_is_one_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab\n\ncd", encoding="utf-8")
    for dataset in (path, str(path)):
        assert token_stream(dataset, by_letter).tolist() == [0, *map(ord, "ab\n\ncd")]


def test_jsonl_takes_objects_and_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab", "id": 1}\n\n"c"\n{"text": ""}\n', encoding="utf-8")
    assert token_stream(path, by_letter).tolist() == [0, 97, 98, 0, 99]


def test_lists_and_tensors():
    assert token_stream(["ab", " ", "c"], by_letter).tolist() == [0, 97, 98, 0, 99]
    tokens = torch.arange(6, dtype=torch.int32).view(2, 3)
    for dataset in (tokens, [tokens[0], tokens[1]]):
        stream = token_stream(dataset, by_letter)
        assert stream.dtype == torch.int64 and stream.tolist() == [0, 1, 2, 3, 4, 5]


def test_max_tokens_stops_reading():
    def texts():
        yield "abc"
        raise AssertionError("read too far")

    class Lazy(list):
        def __iter__(self):
            return texts()

    assert token_stream(Lazy(["abc", "d"]), by_letter, max_tokens=3).tolist() == [0, 97, 98]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "no text"),
        (["", " \n"], "no text"),
        (torch.tensor([5]), "at least 2 tokens to evaluate on, got 1"),
        (torch.tensor([]).long(), "got 0"),
        (torch.rand(9), "integer dtype, got torch.float32"),
        (["a", 3], "entry 1 is int"),
        ([torch.tensor([1]), "a"], "got str"),
        ("just some words", r"expected a \.txt, \.jsonl or \.parquet file, got 'just some words'"),
    ],
)
def test_what_cannot_be_read(dataset, message):
    with pytest.raises(ConfigError, match=message):
        token_stream(dataset, by_letter)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2: not JSON"), ('{"body": "x"}', "line 2: expected a string"), ("3", "line 2")],
)
def test_damaged_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps("ok") + "\n" + line)
    with pytest.raises(ConfigError, match=message):
        token_stream(path, by_letter)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(OSError, match=r"none\.txt"):
        token_stream(tmp_path / "none.txt", by_letter)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        token_stream(tmp_path / "bytes.txt", by_letter)


@pytest.mark.parametrize(
    ("count", "shapes"),
    [
        (12, [(2, 4), (1, 4)]),
        (13, [(2, 4), (1, 4)]),
        (14, [(2, 4), (1, 4), (1, 2)]),
        (3, [(1, 3)]),
    ],
)
def test_windows_do_not_overlap(count, shapes):
    cut = list(windows(torch.arange(count), 4, 2))
    assert [tuple(part.shape) for part in cut] == shapes
    read = torch.cat([part.flatten() for part in cut])
    assert torch.equal(read, torch.arange(read.numel()))


def test_text_becomes_equal_windows():
    found = sequences(["abcde", "fgh"], by_letter, seqlen=3)
    assert [row.tolist() for row in found] == [[0, 97, 98], [99, 100, 101], [0, 102, 103]]
    (short,) = sequences(["abcde"], by_letter, seqlen=100)
    assert short.tolist() == [0, *map(ord, "abcde")]


def test_tokens_keep_their_sequences():
    rows = [torch.arange(5), torch.arange(3), torch.tensor([1])]
    found = sequences(rows, by_letter, seqlen=4)
    assert [row.tolist() for row in found] == [[0, 1, 2, 3], [0, 1, 2]]
    (again,) = sequences(torch.arange(3), by_letter, seqlen=4)
    assert again.tolist() == [0, 1, 2]


def test_masked_positions_are_left_out():
    entry = {
        "input_ids": torch.tensor([[7, 7, 1, 2, 3], [4, 5, 6, 7, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    found = sequences([entry, {"input_ids": [8, 9]}], by_letter, seqlen=9)
    assert [row.tolist() for row in found] == [[1, 2, 3], [4, 5, 6], [8, 9]]


def test_the_choice_follows_the_seed():
    found = [torch.tensor([i, i]) for i in range(100)]
    picks = [choose(found, 10, seed) for seed in (0, 0, 1)]
    numbers = [[int(row[0]) for row in chosen] for chosen, _ in picks]
    assert numbers[0] == numbers[1] != numbers[2]
    assert numbers[0] == sorted(numbers[0]) and len(set(numbers[0])) == 10
    others = [int(row[0]) for row in picks[0][1]]
    assert sorted(numbers[0] + others) == list(range(100)) and others != sorted(others)


def test_parquet_needs_a_column_of_text(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["ab", "c"], "id": [1, 2]}), path)
    assert token_stream(path, by_letter).tolist() == [0, 97, 98, 0, 99]
    parquet.write_table(pyarrow.table({"words": ["ab"]}), path)
    with pytest.raises(ConfigError, match="expected a column 'text', got words"):
        token_stream(path, by_letter)


# ---- names of data sets


class FakeDatasets(types.ModuleType):
    """The package "datasets", as far as hfq calls it; counts the rows that are read."""

    __version__ = "4.1.0"

    def __init__(self, rows):
        super().__init__("datasets")
        self.rows, self.read, self.asked = rows, 0, None

    def load_dataset(self, path, config, *, split, streaming):
        self.asked = (path, config, split, streaming)
        if path == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        return self._stream()

    def _stream(self):
        for row in self.rows:
            self.read += 1
            yield row


@pytest.fixture
def fake(monkeypatch):
    module = FakeDatasets([{"text": "abcd", "content": "xy"} for _ in range(1000)])
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("name", "asked", "first"),
    [
        ("me/texts", ("me/texts", None, "train", True), "a"),
        ("wiki:raw-v1", ("wiki", "raw-v1", "train", True), "a"),
        ("wiki:raw:test", ("wiki", "raw", "test", True), "a"),
        ("me/texts:::content", ("me/texts", None, "train", True), "x"),
    ],
)
def test_names_are_read_as_far_as_needed(fake, name, asked, first):
    found = sequences(name, by_letter, seqlen=10, enough=3)
    assert fake.asked == asked
    assert len(found) == 3 and found[0][:2].tolist() == [0, ord(first)]
    assert fake.read <= 11  # 30 tokens, 3 or 5 in each row
    token_stream(name, by_letter, max_tokens=4)
    assert fake.read <= 13


def test_a_file_is_read_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a" * 99)
    assert len(sequences(path, by_letter, seqlen=10, enough=3)) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "me/texts:::body",
            r"strings in column 'body', got None; it has the columns text, content",
        ),
        ("no/such:x", r"'no/such:x' cannot be read .*doesn't exist.*name:config:split:column"),
        (
            "words",
            r"expected a \.txt, \.jsonl or \.parquet file, got 'words'; a data set .* owner/name",
        ),
    ],
)
def test_names_that_cannot_be_read(fake, name, message):
    with pytest.raises(ConfigError, match=message):
        token_stream(name, by_letter)


def test_without_the_package_or_with_an_old_one(monkeypatch, fake):
    fake.__version__ = "2.19.0"
    with pytest.raises(ConfigError, match=r"can run code .*pip install -U 'datasets>=4'"):
        token_stream("me/texts", by_letter)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 'datasets>=4'"):
        token_stream("me/texts", by_letter)


def test_a_folder_of_the_real_package(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "texts").mkdir()
    rows = "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(50))
    (tmp_path / "texts" / "train.jsonl").write_text(rows)
    stream = token_stream(f"{tmp_path}/texts:::body", by_letter, max_tokens=9)
    assert stream.tolist() == [0, *map(ord, "line 0"), 0, ord("l")]
    with pytest.raises(ConfigError, match=r"column 'text', got None; it has the columns body"):
        token_stream(f"{tmp_path}/texts", by_letter)
    with pytest.raises(ConfigError, match="cannot be read"):
        token_stream(f"{tmp_path}/texts::valid:body", by_letter)
