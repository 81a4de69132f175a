"""`configs`: the shipped configurations by name, with what each is for."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from tabulate import tabulate

from qdora.config_file import SHIPPED, dotted, find_shipped, read_yaml, shipped_names
from qdora.files import read_json

_NEEDS = "needs data"
_WHICH = """its data are files that do not come with qdora, nor from the hub. Where one is not found,
a command says which it is, where it is from, and which key names it."""
_WIDTH = 90
"""Of a comment in the list."""


def list_shipped() -> str:
    """A table of names with the first comments of the files, and a mark where the user has to have files."""
    rows = [
        (SHIPPED + name, _NEEDS if _reads_files(path) else "", _summary(path))
        for name, path in shipped_names().items()
    ]
    return f"{tabulate(rows, tablefmt='plain')}\n\n{_NEEDS}: {_WHICH}"


def _reads_files(path: Path) -> bool:
    """Whether a configuration, or the base of a comparison, has data from files, which are not shipped."""
    if path.suffix != ".yaml":
        return False
    tree = read_yaml(path)
    values = dotted(tree)
    paths = (key.removesuffix("path") for key in values if re.search(r"\bdata\.\w+\.path$", key))
    base = tree.get("base")
    return any(values.get(f"{section}source") != "hub" for section in paths) or (
        isinstance(base, str) and _reads_files(find_shipped(base, beside=path))
    )


def _summary(path: Path) -> str:
    if path.is_dir():
        return str(read_json(path / "config.json")["_name_or_path"])
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("#") and line[1:2] not in ("!", ""))
    first = next((comment for comment in comments if not comment.startswith(("yaml-", "SBATCH"))), "")
    return textwrap.shorten(first, _WIDTH, placeholder=" ...")
