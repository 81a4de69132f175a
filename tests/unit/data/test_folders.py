"""Which files of a folder are data."""

from __future__ import annotations

import pytest

from qdora.data.readers import read_rows, stream_rows
from qdora.errors import InputError


@pytest.fixture
def put(tmp_path):
    """Writes a JSON Lines file whose row says its path."""

    def write(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{{"q": "{name}"}}\n')
        return tmp_path

    return write


def found(folder):
    return [row.values["q"] for row in read_rows(folder)]


def test_files_in_the_order_of_their_paths(put):
    """Catches: files in directory order; an upper-case suffix, or a folder below, passed over."""
    folder = put("data/b.jsonl", "data/a.jsonl", "MORE.JSONL", "z/c/d.jsonl")
    assert found(folder) == ["MORE.JSONL", "data/a.jsonl", "data/b.jsonl", "z/c/d.jsonl"]


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "._a.jsonl",
        ".a.jsonl",
        "_a.jsonl",
        "_temporary/0/a.jsonl",
        "data/.cache/a.json",
        ".cache/a.jsonl.zst",
    ],
)
def test_hidden_files_are_no_data(put, hidden):
    """Catches: a notebook's copy trained on beside the original; a Mac's metadata that ends the run."""
    assert found(put("a.jsonl", "data/b.jsonl", hidden)) == ["a.jsonl", "data/b.jsonl"]


def test_only_hidden_files(put):
    """Catches: 'no data file' beside a file that the user sees, without a reason."""
    with pytest.raises(InputError, match=r"no data file .*left out as hidden: _a\.jsonl"):
        read_rows(put("_a.jsonl"))


def test_the_named_folder_may_be_hidden(put):
    """Catches: a dataset in a cache like ~/.cache that has no files, because a parent is hidden."""
    folder = put(".cache/_mine/a.jsonl")
    assert found(folder / ".cache" / "_mine") == [".cache/_mine/a.jsonl"]
    assert found(folder / ".cache" / "_mine" / "a.jsonl") == [".cache/_mine/a.jsonl"]


@pytest.mark.parametrize("other", ["b.csv", "b.json", "below/b.parquet", "a.jsonl.gz"])
def test_several_kinds_are_refused(put, other):
    """Catches: the rows of one kind trained on and those of the other passed over in silence."""
    with pytest.raises(InputError, match=r"several kinds: .*1 \.jsonl \(a\.jsonl\).*; name the file"):
        read_rows(put("a.jsonl", other))


@pytest.mark.parametrize(
    "other", ["b.jsonl.zst", "b.csv.ZIP", "b.parquet.gz", "b.arrow", "data/b.tsv", "b.ndjson"]
)
def test_data_without_a_reader_is_refused(put, other):
    """Catches: a part of the data passed over in silence, because it is packed or in another format."""
    with pytest.raises(InputError, match="data in a format that cannot be read"):
        read_rows(put("a.jsonl", other))


@pytest.mark.parametrize(
    "other", ["README.md", "LICENSE", "dataset_infos.json", "a/state.json", "notes.txt", "a.jsonl.lock"]
)
def test_files_beside_the_data(put, other):
    """Catches: metadata that comes with a downloaded dataset read as rows, or refused."""
    assert found(put("a.jsonl", other)) == ["a.jsonl"]


def test_links(put, tmp_path_factory):
    """Catches: a linked folder passed over; a loop that is read forever, or twice; a dead link unnoticed."""
    folder = put("a.jsonl")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "b.jsonl").write_text('{"q": "linked"}\n')
    (folder / "far").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert found(folder) == ["a.jsonl", "linked"]
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        read_rows(folder)


def test_folder_that_cannot_be_read(put, monkeypatch):
    """Catches: a folder without permission passed over as if it were empty."""
    import os

    folder, scandir = put("a.jsonl", "closed/b.jsonl"), os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="closed: cannot be read: Permission denied"):
        read_rows(folder)


CARD = """---
license: mit
configs:
- config_name: sums
  default: true
  data_files:
  - split: train
    path: "a/*.jsonl"
  - split: test
    path: b/second.jsonl
- config_name: others
  data_files: c/third.jsonl
---
# Sums
"""


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (
            (
                "data/train-00000-of-00002.jsonl",
                "data/train-00001-of-00002.jsonl",
                "data/test-00000-of-00001.jsonl",
            ),
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            ["data/test-00000-of-00001.jsonl"],
        ),
        (
            ("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"),
            ["train/a.jsonl", "train/b.jsonl"],
            ["test/a.jsonl"],
        ),
        (("my_train.jsonl", "my_test.jsonl"), ["my_train.jsonl"], ["my_test.jsonl"]),
    ],
)
def test_splits_by_names(put, names, train, test):
    """Catches: the test files of a downloaded dataset trained on, because the folder was read as one set."""
    folder = put(*names, "dataset_infos.json")
    (folder / "dataset_infos.json").write_text("{}")
    assert [row.values["q"] for row in stream_rows(folder, "train")] == train
    assert [row.values["q"] for row in stream_rows(folder, "test")] == test
    with pytest.raises(InputError, match=r"split 'validation'; allowed: test, train|split 'validation'"):
        stream_rows(folder, "validation")
    assert len(read_rows(folder)) == len(names)


def test_splits_by_the_readme(put):
    """Catches: a README's configurations not followed, or another configuration's files read beside."""
    folder = put("a/first.jsonl", "b/second.jsonl", "c/third.jsonl")
    (folder / "README.md").write_text(CARD)
    assert [row.values["q"] for row in stream_rows(folder, "train")] == ["a/first.jsonl"]
    (row,) = stream_rows(folder, "test")
    assert row.origin == f"{folder / 'b' / 'second.jsonl'}:1"
    assert [row.values["q"] for row in stream_rows(folder, "train", "others")] == ["c/third.jsonl"]
    with pytest.raises(InputError, match=r"hub's layout: .*others"):
        stream_rows(folder, "train", "other")


@pytest.mark.parametrize(
    "names", [("a.jsonl", "b.jsonl"), ("train.jsonl",), ("train/a.jsonl", "train/b.jsonl")]
)
def test_a_folder_of_one_set(put, names):
    """Catches: a folder without splits that is no longer read, or read by another library."""
    folder = put(*names)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert [row.values["q"] for row in stream_rows(folder, "test")] == list(names)
