"""`configs`: the shipped configurations by name, with what each is for."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tabulate import tabulate

from qdora.config_file import SHIPPED, shipped_names
from qdora.files import read_json

_WIDTH = 90
"""Of a comment in the list."""


def list_shipped() -> str:
    """A table of names, each with the first comment of its file."""
    rows = [(SHIPPED + name, _summary(path)) for name, path in shipped_names().items()]
    return tabulate(rows, tablefmt="plain")


def _summary(path: Path) -> str:
    if path.is_dir():
        return str(read_json(path / "config.json")["_name_or_path"])
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("#") and line[1:2] not in ("!", ""))
    first = next((comment for comment in comments if not comment.startswith(("yaml-", "SBATCH"))), "")
    return textwrap.shorten(first, _WIDTH, placeholder=" ...")
