"""Local files: true lines, and what a broken file says."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdora.data.columnar import read_hub
from qdora.data.readers import read_json, read_rows
from qdora.data.rows import BadRowError, text_of
from qdora.errors import DataError, InputError


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_json_array_lines(tmp_path):
    """Catches: array elements named by the line on which they end; all rows of one line under one name,
    so that a row that is left out takes the others out of the fingerprint."""
    path = write(tmp_path / "a.json", '[\n  {"q": 1},\n\n  {"q":\n 2}, {"q": 3}\n]\n')
    assert [row.origin for row in read_rows(path)] == [f"{path}:{n}" for n in (2, 4, 5)]
    write(path, '[{"q": 1}, {"q": 2}, {"q": 3}]')
    assert [row.origin for row in read_rows(path)] == [f"{path}:{n}" for n in (1, "1[1]", "1[2]")]


def test_jsonl_lines_with_blanks_bom_and_separators(tmp_path):
    """Catches: blank lines that shift the count, a byte order mark read as text, a split at U+2028."""
    text = '﻿{"q": "a\u2028b"}\r\n\r\n{"q": "c"}'
    path = write(tmp_path / "a.jsonl", text)
    rows = read_rows(path)
    assert [(row.origin, row.values["q"]) for row in rows] == [(f"{path}:1", "a\u2028b"), (f"{path}:3", "c")]


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=3), max_size=5),
    indent=st.one_of(st.none(), st.integers(0, 3)),
)
def test_json_array_equals_the_parser(tmp_path_factory, rows, indent):
    """Catches: an element lost or changed by walking the array by hand."""
    text = json.dumps(rows, indent=indent)
    path = write(tmp_path_factory.mktemp("h") / "a.json", text)
    read = list(read_json(path))
    assert [row.values for row in read] == rows
    for row in read:
        line = int(row.origin.rpartition(":")[2].partition("[")[0])
        assert "{" in text.split("\n")[line - 1]


def test_numbers_keep_their_spelling(tmp_path):
    """Catches: a gold answer 4.0 or 12345678901234567890.5 changed by a float on the way."""
    path = write(tmp_path / "a.json", '[{"a": 4.0, "b": 12345678901234567890.5, "c": 1e3, "d": -7}]')
    assert list(read_rows(path)[0].values.values()) == ["4.0", "12345678901234567890.5", "1e3", "-7"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"q": 1},\n{"q": \n]', 4, "not valid JSON"),
        ('[\n{"q": 1}\n{"q": 2}]', 3, "expected ',' or ']'"),
        ('[\n{"q": 1},\n]', 3, "not valid JSON"),
        ('[\n{"q": 1}]\n\nmore', 4, "text behind the array"),
        ('[\n{"q": 1}', 2, "expected ',' or ']'"),
        ('[{"q": 1},\n{"q": NaN}]', 2, "NaN is not JSON"),
        ("\n\nhello", 3, "expected a JSON array"),
        ("", 1, "expected a JSON array"),
        ("[\n" + "[" * 200_000, 2, "not valid JSON"),
    ],
)
def test_broken_array_names_the_line(tmp_path, text, line, reason):
    """Catches: a broken array reported without its line, or a crash of the parser shown to the user."""
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert f"{path}:{line}: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"q": ', "not valid JSON"),
        (b'{"q": Infinity}', "Infinity is not JSON"),
        (b'"text"', "expected a JSON object, got str"),
        (b'{"q": "\xff"}', "not UTF-8 text: byte 0xff"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_bad_jsonl_line_is_a_bad_row(tmp_path, line, reason):
    """Catches: one bad line that stops the file, loses its neighbours or its line number."""
    path = write(tmp_path / "a.jsonl", b'{"q": 1}\n' + line + b'\n{"q": 2}\n')
    rows = read_rows(path)
    assert [row.origin for row in rows] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert [row.problem is None for row in rows] == [True, False, True]
    assert reason in (rows[1].problem or "")


def test_csv_lines_of_multiline_records(tmp_path):
    """Catches: quoted line breaks that shift the line of the records behind them."""
    path = write(tmp_path / "a.csv", '﻿q,a\r\n"two\r\nlines",1\r\n\r\nx,2\r\n')
    rows = read_rows(path)
    assert [(row.origin, dict(row.values)) for row in rows] == [
        (f"{path}:2", {"q": "two\r\nlines", "a": "1"}),
        (f"{path}:5", {"q": "x", "a": "2"}),
    ]


def test_csv_bad_records_are_bad_rows(tmp_path):
    """Catches: missing or extra fields filled up silently; a bad record that stops the ones behind it."""
    path = write(tmp_path / "a.csv", 'q,a\nx\nx,1,2\n"x"y,1\nx,1\n"open,1\n')
    rows = read_rows(path)
    assert [row.origin for row in rows] == [f"{path}:{n}" for n in (2, 3, 4, 5, 6)]
    assert "1 fields, but the header names 2" in (rows[0].problem or "")
    assert "3 fields, but the header names 2" in (rows[1].problem or "")
    assert "not valid CSV" in (rows[2].problem or "")
    assert rows[3].problem is None
    assert "not valid CSV" in (rows[4].problem or "")


@pytest.mark.parametrize("again", ["q,a", "\ufeffq, a"])
def test_csv_header_again_is_a_bad_row(tmp_path, again):
    """Catches: the header of a second file put behind the first one trained on as a row."""
    rows = read_rows(write(tmp_path / "a.csv", f"q,a\nx,1\n{again}\nx,2\n"))
    assert [row.problem is None for row in rows] == [True, False, True]
    assert "the header line again" in (rows[1].problem or "")


@pytest.mark.parametrize("behind", ["x,2\nx,3\n", 'x,2\nx,"3"\n'])
def test_csv_quote_that_swallows_rows(tmp_path, behind):
    """Catches: the rows behind an unclosed quote lost as one bad row where bad rows are skipped."""
    path = write(tmp_path / "a.csv", f'q,a\nx,1\n"open,1\n{behind}')
    with pytest.raises(DataError, match=r"a\.csv:3: not valid CSV: .*takes in the lines up to [45]"):
        read_rows(path)


def test_csv_cell_over_the_limit_of_the_module(tmp_path):
    """Catches: a long text refused as 'field larger than field limit'; a limit left changed for others."""
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    rows = read_rows(write(tmp_path / "a.csv", f"q,a\n{long},1\n"))
    assert rows[0].values["q"] == long
    assert csv.field_size_limit() == before
    with pytest.raises(DataError):
        read_rows(write(tmp_path / "b.csv", ""))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(("text", "reason"), [("", "no header line"), ("q,a,q\n1,2,3\n", "repeat: 'q'")])
def test_csv_header(tmp_path, text, reason):
    """Catches: a column silently overwritten by another of the same name; an empty file read as no rows."""
    with pytest.raises(DataError, match=reason):
        read_rows(write(tmp_path / "a.csv", text))


def test_not_utf8_names_the_line(tmp_path):
    """Catches: a Latin-1 file reported as a decoder's traceback without a line."""
    path = write(tmp_path / "a.csv", b"q,a\nx,1\ncaf\xe9,2\n")
    with pytest.raises(DataError, match=r"a\.csv:3: not UTF-8 text: byte 0xe9"):
        read_rows(path)


def test_parquet_rows_and_errors(tmp_path):
    """Catches: Parquet read through a cache, rows without their index, a broken file as a traceback."""
    folder = tmp_path / "split=train"
    folder.mkdir()
    path = folder / "a.parquet"
    pq.write_table(pa.table({"q": ["x", None], "n": [1.5, 2.0]}), path)
    rows = read_rows(path)
    assert [(row.origin, row.values) for row in rows] == [
        (f"{path}[0]", {"q": "x", "n": 1.5}),
        (f"{path}[1]", {"q": None, "n": 2.0}),
    ]
    broken = write(tmp_path / "b.parquet", "no parquet")
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as Parquet"):
        read_rows(broken)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"q": 1}\n{"q": 2}\n', (1, 2)),
        ('\n{"q": 1}\n\n{"q": 2}', (2, 4)),
        ('[{"q": 1},\n{"q": 2}]', (1, 2)),
        ('\n[\n{"q": 1}, {"q":\n2}]\n', (3, "3[1]")),
        ('{\n  "q": 1\n}', (1,)),
        ('{"q": 1,\n "a": [{"b": 2}]}\n', (1,)),
        ('{"q": 1, "a": [{"b": 2}]}', (1,)),
        ('{\n"q": 1\n}\n{\n"q": 2\n}\n', (1, 4)),
    ],
)
def test_json_is_read_as_it_is_written(tmp_path, name, text, lines):
    """Catches: a suffix that decides instead of the text: an array in a .jsonl, an indented object in a
    .json reported line by line as broken JSON, its rows lost or repeated."""
    path = write(tmp_path / name, text)
    rows = read_rows(path)
    assert [row.origin for row in rows] == [f"{path}:{n}" for n in lines]
    assert [row.values["q"] for row in rows] == ["1", "2"][: len(lines)]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{\n  "q": 1,\n  "a" 2\n}', 3, "Expecting ':'"),
        ('{\n"q": 1\n}\n{\n"q": NaN\n}', 4, "NaN is not JSON"),
        ('{\n"q": 1\n}\nmore', 4, "Expecting value"),
    ],
)
def test_broken_indented_object_names_the_line(tmp_path, text, line, reason):
    """Catches: 'line 1 is not valid JSON' for every error in an indented file."""
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=reason) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:{line}: not valid JSON")


@pytest.mark.parametrize("text", ['{"q": 1}\n{"q": 1, "a": 2, "q": 3}\n', '[{"q": 1},\n{"q": 1, "q": 3}]'])
def test_repeated_key_is_a_bad_row(tmp_path, text):
    """Catches: the last of two values under one key taken in silence."""
    path = write(tmp_path / "a.json", text)
    good, bad = read_rows(path)
    assert good.problem is None
    assert (bad.origin, bad.problem) == (f"{path}:2", "the key 'q' repeats")


def test_repeated_key_within_a_value_is_not_text(tmp_path):
    """Catches: what stands for such an object taken as a column's text."""
    (row,) = read_rows(write(tmp_path / "a.json", '{"q": {"x": 1, "x": 2}, "a": 1}'))
    assert text_of(row, "a") == "1"
    with pytest.raises(BadRowError, match="holds a RepeatedKey, expected text"):
        text_of(row, "q")


def test_rows_under_a_key_are_named(tmp_path):
    """Catches: a file whose rows stand under a key reported as one without the column, with no way out."""
    (row,) = read_rows(write(tmp_path / "a.json", '{\n"version": 1,\n"data": [{"q": 1}, {"q": 2}]\n}'))
    expected = "column 'q' is missing; allowed: data, version; the objects under 'data' have it"
    with pytest.raises(BadRowError, match=expected):
        text_of(row, "q")


PLAIN = {"json": '[{"q": "é"}]', "jsonl": '{"q": "é"}\n', "csv": "q\né\n"}


@pytest.mark.parametrize("suffix", PLAIN)
@pytest.mark.parametrize("compression", ["gz", "bz2", "XZ"])
def test_compressed_files(tmp_path, suffix, compression):
    """Catches: a compressed file refused, or read as broken text; a broken one that ends in a traceback."""
    module = {"gz": gzip, "bz2": bz2, "xz": lzma}[compression.lower()]
    packed = module.compress(PLAIN[suffix].encode())
    path = tmp_path / f"a.{suffix}.{compression}"
    assert [row.values["q"] for row in read_rows(write(path, packed))] == ["é"]
    assert len(read_rows(tmp_path)) == 1
    for broken in (packed[:-3], b"no archive", packed[:9] + bytes(len(packed))):
        with pytest.raises(InputError, match="cannot be read: "):
            read_rows(write(path, broken))


def test_repeated_parquet_column(tmp_path):
    """Catches: the last of two columns of the same name taken in silence."""
    table = pa.table([["x"], ["1"], ["2"]], names=["q", "a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column names repeat: 'a'"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([0.1], pa.float32()), "0.1"),
        (pa.array([np.float16(0.1)], pa.float16()), "0.1"),
        (pa.array([0.1]), "0.1"),
        (pa.array([Decimal("4.50")]), "4.50"),
        (pa.array([2**62]), str(2**62)),
        (pa.array([True]), "true"),
        (pa.array(["4"]).dictionary_encode(), "4"),
        (pa.array(["4"], pa.large_string()), "4"),
        (pa.array([float("nan")]), "holds nan, expected text or a finite number"),
        (pa.array([float("nan")], pa.float32()), "holds nan"),
        (pa.array([float("-inf")]), "holds -inf"),
        (pa.array([None], pa.string()), "is empty"),
        (pa.array([None]), "is empty"),
        (pa.array([b"4"]), "holds a bytes"),
        (pa.array([["4"]]), "holds a list"),
        (pa.array([date(2024, 5, 1)]), "holds a date"),
        (pa.array([datetime(2024, 5, 1)]), "holds a datetime"),
    ],
)
@pytest.mark.parametrize("source", ["parquet", "hub"])
def test_column_types(tmp_path, monkeypatch, values, text, source):
    """Catches: a missing number that becomes the gold answer 'nan'; a float of 32 bits that becomes
    0.10000000149011612; a type that is no text taken as its Python spelling; a hub read another way."""
    table = pa.table({"a": values})
    if source == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset(table))
        (row,) = read_hub("x/y", None, "train", ["a"])
    else:
        pq.write_table(table, tmp_path / "a.parquet")
        (row,) = read_rows(tmp_path / "a.parquet")
    if text.startswith(("holds", "is")):
        with pytest.raises(BadRowError, match=f"column 'a' {text}"):
            text_of(row, "a")
    else:
        assert text_of(row, "a") == text


def test_parquet_that_python_cannot_hold(tmp_path):
    """Catches: text that is not UTF-8, or a date beyond Python's, as a traceback."""
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    for values in (text, pa.array([10**9], pa.date32())):
        pq.write_table(pa.table({"a": values}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet: cannot be read as Parquet"):
            read_rows(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as Parquet"):
        read_rows(write(tmp_path / "b.parquet", ""))


def test_missing_paths(tmp_path):
    """Catches: a missing file reported without the path, what was expected, and what is there."""
    write(tmp_path / "train.json", "[]")
    with pytest.raises(InputError, match=r"trian\.json: no such file.*expected a json.*mean 'train\.json'"):
        read_rows(tmp_path / "trian.json")
    with pytest.raises(InputError, match=r"holds: train\.json"):
        read_rows(tmp_path / "zzz")
    with pytest.raises(InputError, match=r"no folder .*nowhere either"):
        read_rows(tmp_path / "nowhere" / "a.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        read_rows(tmp_path / "empty" / "a.json")
    with pytest.raises(InputError, match="no data file in this folder"):
        read_rows(tmp_path / "empty")


def test_unknown_suffix(tmp_path):
    """Catches: a file of another kind read as text and reported as broken JSON."""
    with pytest.raises(InputError, match=r"unknown suffix '\.jsonx'; did you mean '\.json'"):
        read_rows(write(tmp_path / "a.jsonx", "[]"))


def test_unreadable_file(tmp_path, monkeypatch):
    """Catches: a permission error that ends in a traceback."""
    path = write(tmp_path / "a.json", "[]")

    def refuse(self: Path, *args: object, **kwargs: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"a\.json: cannot be read: Permission denied"):
        read_rows(path)
