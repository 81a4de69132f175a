"""Which files of a folder are data, and of a folder in the hub's layout which are a split's."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import yaml

from qdora.errors import InputError, suggest

COMPRESSED = (".gz", ".bz2", ".xz")
"""Suffixes behind which a file of text may stand compressed."""

_HIDDEN = (".", "_")

_METADATA = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
"""What the hub and `datasets` write beside the data."""

_UNREADABLE = frozenset({".arrow", ".feather", ".ndjson", ".orc", ".tsv", ".xls", ".xlsx"})
"""Suffixes of data in formats that there is no reader for."""


def kind_of(path: Path, kinds: Collection[str]) -> str | None:
    """The suffix that says how a file is read, in lower case, with that of its compression; None without one.

    Args:
        kinds: the suffixes that have a reader.
    """
    last = path.suffix.lower()
    if last not in COMPRESSED:
        return last if last in kinds else None
    inner = Path(path.stem).suffix.lower()
    return inner + last if inner in kinds and inner != ".parquet" else None


def data_files(folder: Path, kinds: Collection[str]) -> list[Path]:
    """The data files in a folder and below it, in the order of their paths.

    As for pyarrow and `datasets`, names that begin with `.` or `_` below the folder are no data: copies of
    an editor or notebook, marks of a finished job.  Links are followed; a folder is read once.

    Args:
        kinds: the suffixes that have a reader.
    Raises: InputError: no data file, files of several kinds, data in a format without a reader, or a folder
        that cannot be read.
    """
    by_kind: dict[str, list[Path]] = {}
    hidden: list[str] = []
    for path in _walk(folder, hidden):
        kind = kind_of(path, kinds)
        if kind is None:
            _refuse_unreadable(path, kinds)
        elif path.name not in _METADATA:
            by_kind.setdefault(kind, []).append(path)
    if not by_kind:
        left_out = f"; left out as hidden: {_some(hidden)}" if hidden else ""
        raise InputError(
            f"{folder}: no data file in this folder; expected one of: {', '.join(kinds)}{left_out}"
        )
    if len(by_kind) > 1:
        raise InputError(f"{folder}: data files of several kinds: {_found(folder, by_kind)}; {_ONE_KIND}")
    (files,) = by_kind.values()
    return sorted(files)


_ONE_KIND = "name the file that is meant, or a folder with files of one kind"


def _walk(folder: Path, hidden: list[str]) -> Iterator[Path]:
    """All files; a broken link is one, because reading then names it.  Hidden names are put into `hidden`."""

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror or error}") from None

    seen: set[Path] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden += (name for name in (*folders, *files) if name.startswith(_HIDDEN))
        folders[:] = sorted(name for name in folders if not name.startswith(_HIDDEN))
        yield from (Path(parent, name) for name in files if not name.startswith(_HIDDEN))


_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders by which `datasets` tells splits."""


def has_splits(folder: Path, kinds: Collection[str]) -> bool:
    """Whether a folder is in the hub's layout: its README lists configurations, or names tell several splits.

    Args:
        kinds: as for `data_files`.
    """
    if "configs" in _card(folder / "README.md"):
        return True
    found = set()
    for path in _walk(folder, []):
        if kind_of(path, kinds) is not None and path.name not in _METADATA:
            words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
            found |= {split for split, names in _SPLITS.items() if not {*names}.isdisjoint(words)}
    return len(found) > 1


def _card(readme: Path) -> Mapping[str, object]:
    """The YAML at the head of a dataset's README."""
    try:
        head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL)
        card = yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return card if isinstance(card, dict) else {}


def split_files(folder: Path, name: str | None, split: str) -> list[Path]:
    """The files of one split of a folder in the hub's layout, as `datasets` finds them; none is run.

    Args:
        name: of a configuration, where the README lists several.
    Raises: InputError: no such configuration or split, or the layout cannot be read.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), name)
        files = {str(key): [Path(file) for file in found] for key, found in builder.config.data_files.items()}
    except Exception as error:  # it raises errors without a common base
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "" if name else "; a configuration is chosen by source: hub, with path: FOLDER and name: NAME"
        raise InputError(
            f"{folder}: cannot be read as a folder in the hub's layout: {reason}{hint}"
        ) from None
    if split not in files:
        raise InputError(f"{folder}: split {split!r}; {suggest(split, files)}")
    return files[split]


def _refuse_unreadable(path: Path, kinds: Collection[str]) -> None:
    """Refuse a file that is data by its name: it must not be passed over beside others."""
    *_, inner, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    if last in _UNREADABLE or (inner in kinds and last in (*COMPRESSED, ".zst", ".zip")):
        raise InputError(
            f"{path}: data in a format that cannot be read; allowed: {', '.join(kinds)}, and compressed as "
            f"{', '.join(COMPRESSED)} all but .parquet; {_ONE_KIND}"
        )


def _found(folder: Path, by_kind: Mapping[str, list[Path]]) -> str:
    return " and ".join(
        f"{len(files)} {kind} ({_some([str(file.relative_to(folder)) for file in files])})"
        for kind, files in sorted(by_kind.items())
    )


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
