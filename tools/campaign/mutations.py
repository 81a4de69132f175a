"""Ways to damage bytes, JSON and YAML trees, safetensors headers and folders."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64 + 1, 10**400, float("nan"),
    float("inf"), "", " ", "\0", "\ud800", "x" * 70_000, "../../x", "/etc/passwd", "~root", "nan", "1e3",
    "true", "None", "\u202e\n\x1b[31m", [], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": {"b": 1}},
    "float16",
)  # fmt: skip
_DEEP = 2000


class Bomb:
    """Unpickled, it makes a file: the sign that code was run."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def bomb(canary: Path, *, zipped: bool) -> bytes:
    """A pickle, bare or in a zip archive as torch.save writes it."""
    data = pickle.dumps(Bomb(canary))
    if not zipped:
        return data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def damage_bytes(rng: Random, data: bytes, canary: Path) -> tuple[str, bytes]:
    """The name of a change, and the bytes after it."""
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 8, 64, 1000))
    name = rng.choice(("truncate", "empty", "flip", "flip", "zero", "delete", "insert", "repeat", "pickle",
                       "zip", "append", "bom", "utf16", "crlf", "swap"))  # fmt: skip
    if name == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return name, bytes(changed)
    middle, after = data[at : at + length], data[at + length :]
    changes: dict[str, Callable[[], bytes]] = {
        "truncate": lambda: data[:at],
        "empty": lambda: b"",
        "zero": lambda: data[:at] + bytes(len(middle)) + after,
        "delete": lambda: data[:at] + after,
        "insert": lambda: data[:at] + rng.randbytes(length) + data[at:],
        "repeat": lambda: data[:at] + middle * 3 + after,
        "pickle": lambda: bomb(canary, zipped=False),
        "zip": lambda: bomb(canary, zipped=True),
        "append": lambda: data + rng.randbytes(length),
        "bom": lambda: b"\xef\xbb\xbf" + data,
        "utf16": lambda: data.decode("utf-8", "replace").encode("utf-16"),
        "crlf": lambda: data.replace(b"\n", b"\r\n"),
        "swap": lambda: data[at:] + data[:at],
    }
    return f"{name} at {at}", changes[name]()


def damage_tree(rng: Random, tree: Any) -> tuple[str, Any]:
    """The name of a change at a random node of a nested structure, and the structure after it."""
    tree = json.loads(json.dumps(tree))
    places = list(_places(tree, ()))
    if not places:
        return "nothing", tree
    path = rng.choice(places)
    parent, key = _at(tree, path[:-1]), path[-1]
    name = rng.choice(("replace",) * 6 + ("delete", "rename", "add", "nest", "wrap", "text", "negate"))
    if name == "replace":
        parent[key] = rng.choice(WEIRD)
    elif name == "delete":
        del parent[key]
    elif name == "rename" and isinstance(parent, dict):
        parent[rng.choice((f"{key}x", key.upper(), "", "__class__", "../" + key))] = parent.pop(key)
    elif name == "add" and isinstance(parent, dict):
        parent[rng.choice(("auto_map", "_target_", "trust_remote_code", "extends", "x.y"))] = rng.choice(
            WEIRD
        )
    elif name == "nest":
        # The writers below are recursive too; the text stands in for the depth until they are done.
        parent[key] = "@deep@"
    elif name == "wrap":
        parent[key] = [parent[key]]
    elif name == "text":
        parent[key] = str(parent[key])
    elif name == "negate" and isinstance(parent[key], (int, float)):
        parent[key] = -parent[key]
    now = parent.get(key) if isinstance(parent, dict) else None
    return f"{name} {'.'.join(map(str, path))} -> {str(now)[:40]!r}", tree


def deepened(text: str) -> str:
    """JSON or YAML text with the marker of `damage_tree` replaced by lists in lists, 2000 deep."""
    return re.sub(r"[\"']?@deep@[\"']?", "[" * _DEEP + "]" * _DEEP, text)


def damage_json(rng: Random, text: str) -> tuple[str, str]:
    """A change of a JSON document: of its tree, or a key that stands there twice."""
    tree = json.loads(text)
    if rng.random() < 0.1 and isinstance(tree, dict) and tree:
        key = rng.choice(sorted(tree))
        return (
            f"twice {key}",
            "{" + f"{json.dumps(key)}: {json.dumps(rng.choice(WEIRD[:14]))}, " + text.lstrip()[1:],
        )
    name, changed = damage_tree(rng, tree)
    return name, deepened(json.dumps(changed))


def damage_header(rng: Random, data: bytes) -> tuple[str, bytes]:
    """A safetensors file whose header lies."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(header.keys() - {"__metadata__"})
    entry = header[name := rng.choice(names)]
    what = rng.choice(("shape", "shape", "dtype", "offsets", "name", "length", "metadata", "tree", "twice"))
    if what == "shape":
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**63], [2**32, 2**32], [*entry["shape"], 1], entry["shape"][::-1], [1] * 1000,
             [x + 1 for x in entry["shape"]], [1.5], ["a"], None)
        )  # fmt: skip
    elif what == "dtype":
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "C64", "X", "", None, 3)
        )
    elif what == "offsets":
        first, last = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([last, first], [first + 1, last], [first, last + 8], [0, 2**63], [-8, last], [first], [], None,
             [0, last - first])
        )  # fmt: skip
    elif what == "name":
        header[rng.choice(("../x", "", "a" * 5000, "model", name + ".weight", "__metadata__"))] = header.pop(
            name
        )
    elif what == "metadata":
        header["__metadata__"] = rng.choice(({}, {"format": "tf"}, {"a": 1}, [], None, {"x": "y" * 100_000}))
    elif what == "tree":
        note, header = damage_tree(rng, header)
        what = f"tree {note}"
    text = deepened(json.dumps(header))
    if what == "twice":
        text = "{" + f"{json.dumps(name)}: {json.dumps(entry)}, " + text[1:]
    encoded = text.encode("utf-8", "surrogatepass")
    stated = len(encoded)
    if what == "length":
        stated = rng.choice((0, 1, stated - 1, stated + 8, 2**31, 2**63 - 1, 2**64 - 1))
    return f"header {what} of {name}", stated.to_bytes(8, "little") + encoded + body


def damage_entry(rng: Random, path: Path, elsewhere: Path) -> str:
    """Put something else in a file's place; the name of the change.

    Args:
        elsewhere: a folder with `file` and `folder/`, which must stay as they are.
    """
    path.unlink()
    change: dict[str, Callable[[], object]] = {
        "remove": lambda: None,
        "folder": path.mkdir,
        "dangling link": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path.name),
        "link outside": lambda: path.symlink_to(elsewhere / "file"),
        "link to a folder": lambda: path.symlink_to(elsewhere / "folder"),
        "device": lambda: path.symlink_to(os.devnull),
    }
    name = rng.choice(list(change))
    change[name]()
    return name


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
