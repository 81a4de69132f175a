"""Local files: true lines, and what a broken file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdora.data.readers import read_json, read_rows
from qdora.errors import DataError, InputError


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_json_array_lines(tmp_path):
    """Catches: array elements named by index or by the line on which they end."""
    path = write(tmp_path / "a.json", '[\n  {"q": 1},\n\n  {"q":\n 2}, {"q": 3}\n]\n')
    assert [row.origin for row in read_rows(path)] == [f"{path}:{n}" for n in (2, 4, 5)]


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
    read = read_json(path)
    assert [row.values for row in read] == rows
    for row in read:
        line = int(row.origin.rpartition(":")[2])
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


def test_json_suffix_with_json_lines(tmp_path):
    """Catches: JSON Lines in a .json file, common on the hub, refused."""
    path = write(tmp_path / "a.json", '{"q": 1}\n{"q": 2}\n')
    assert len(read_rows(path)) == 2


def test_csv_lines_of_multiline_records(tmp_path):
    """Catches: quoted line breaks that shift the line of the records behind them."""
    path = write(tmp_path / "a.csv", '﻿q,a\r\n"two\r\nlines",1\r\n\r\nx,2\r\n')
    rows = read_rows(path)
    assert [(row.origin, dict(row.values)) for row in rows] == [
        (f"{path}:2", {"q": "two\r\nlines", "a": "1"}),
        (f"{path}:5", {"q": "x", "a": "2"}),
    ]


def test_csv_bad_records_are_bad_rows(tmp_path):
    """Catches: missing or extra fields filled up silently, and an unclosed quote that eats the file."""
    path = write(tmp_path / "a.csv", 'q,a\nx\nx,1,2\n"x"y,1\nx,1\n"open,1\nx,2\n')
    rows = read_rows(path)
    assert [row.origin for row in rows] == [f"{path}:{n}" for n in (2, 3, 4, 5, 6)]
    assert "1 fields, but the header names 2" in (rows[0].problem or "")
    assert "3 fields, but the header names 2" in (rows[1].problem or "")
    assert "not valid CSV" in (rows[2].problem or "")
    assert rows[3].problem is None
    assert "not valid CSV" in (rows[4].problem or "")


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
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def test_folder_reads_one_kind_in_order(tmp_path):
    """Catches: metadata JSON of a downloaded Parquet dataset read as rows; files in directory order."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "b.jsonl", '{"q": 2}\n')
    write(tmp_path / "data" / "a.jsonl", '{"q": 1}\n')
    write(tmp_path / "dataset_infos.json", "{}")
    assert [row.values["q"] for row in read_rows(tmp_path)] == ["1", "2"]


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

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"a\.json: cannot be read: Permission denied"):
        read_rows(path)
