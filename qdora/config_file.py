"""Configuration files: strict YAML into the models of `qdora/config/`, and back; the shipped ones by name.

An unknown key, a wrong type or an impossible combination is an `InputError` that names file,
key, what came, what is allowed and the nearest key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import ValidationError

from qdora.config import RunConfig, Section, explain
from qdora.errors import InputError, suggest

C = TypeVar("C", bound=Section)

SHIPPED = "qdora:"
"""Before the name of a shipped file or folder."""
QUICKSTART = f"{SHIPPED}quickstart"
_MOST_VALUES = 100_000
"""Aliases let a few lines of YAML stand for billions of values."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"key {key!r} given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))


def shipped_folder() -> Path:
    """The folder of the shipped configurations: `configs/` of the package, or of its checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_names() -> dict[str, Path]:
    """Shipped configurations, launch files and folders of architectures by name, without `qdora:`."""
    root = shipped_folder()
    files = [*root.rglob("*.yaml"), *root.rglob("*.sbatch")]
    named = {path.relative_to(root).as_posix().removesuffix(".yaml"): path for path in files}
    folders = {path.parent.relative_to(root).as_posix(): path.parent for path in root.rglob("config.json")}
    return dict(sorted((named | folders).items()))


def find_shipped(name: str | Path, beside: Path | None = None) -> Path:
    """The file or folder that a name stands for: `qdora:NAME` a shipped one, any other a path.

    Args:
        name: `qdora:compare/quickstart`, with or without `.yaml`, or a path.
        beside: a file to whose folder a path is relative; None for the working directory.
    Raises: InputError: nothing of that name ships; with the nearest name and all of them.
    """
    text = str(name)
    if not text.startswith(SHIPPED):
        return Path(name) if beside is None else beside.parent / name
    names = {f"{SHIPPED}{own}": path for own, path in shipped_names().items()}
    found = names.get(text.removesuffix(".yaml"))
    if found is None:
        raise InputError(f"{text!r}: nothing of that name ships; {suggest(text, names)}")
    return found


def data_note(path: str | Path) -> str:
    """A sentence on the data of a configuration file, out of its comment `# Data: ...`; empty without one."""
    found = re.search(r"(?m)^# Data: (.+)$", find_shipped(path).read_text(encoding="utf-8"))
    return "" if found is None else f". Data of {path}: {found[1]}"


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: type[C]) -> C: ...
def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[Section] = RunConfig) -> Section:
    """Read a YAML file, apply `a.b=c` overrides, and check everything.

    Args:
        path: the YAML file, or `qdora:NAME`.
        overrides: `key.key=value`, the value in YAML.
        kind: the section that the file holds.
    Raises: InputError: file missing or not YAML; unknown key, wrong type, impossible combination.
    """
    tree = read_yaml(path)
    apply_overrides(tree, overrides)
    return check_config(tree, kind, str(path))


def check_config(tree: dict[str, Any], kind: type[C], origin: str) -> C:
    """Validate a tree of plain values; `origin` is named in errors.

    Raises: InputError: as `load_config`.
    """
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(kind, error)}") from None
    except TypeError as error:
        raise InputError(f"{origin}: a value is not plain YAML ({error})") from None


def parse_config(text: str, kind: type[C], origin: str) -> C:
    """Read a text as `load_config` reads a file.

    Raises: InputError: as `load_config`.
    """
    tree = _parse(text, f"{origin}: not")
    if not isinstance(tree, dict):
        raise InputError(f"{origin}: expected a mapping of sections, got {type(tree).__name__}")
    return check_config(tree, kind, origin)


def dump_config(config: Section) -> str:
    """The fully resolved configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_digest(config: Section) -> str:
    """What tells two configurations apart, in few letters."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping, of a file or of `qdora:NAME`.

    Raises: InputError: missing, unreadable, not YAML or not a mapping.
    """
    file = find_shipped(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    tree = _parse(text, f"{path}: not")
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in a nested mapping, making the mappings on the way.

    Raises: InputError: a key on the way holds a plain value.
    """
    *parents, last = dotted.split(".")
    node = tree
    for key in parents:
        if node.get(key) is None:  # missing, or a section that may be null
            node[key] = {}
        child = node[key]
        if not isinstance(child, dict):
            raise InputError(f"--set {dotted}: {key!r} holds {child!r}, it has no keys below it")
        node = child
    node[last] = value


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each `a.b=c`, the value in YAML.

    Raises: InputError: an override is not of that form.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override!r}: expected key=value, for example training.max_steps=20")
        set_key(tree, key.strip(), _parse(value, f"--set {override!r}: the value is not"))


def _parse(text: str, complaint: str) -> Any:
    """The plain values that a YAML text stands for.

    Raises: InputError: not YAML, or more values than any configuration has; begins with `complaint`.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
        count = _count_values(value, {})
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that there is not
        raise InputError(f"{complaint} valid YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{complaint} usable: it is nested too deeply, or an alias holds itself") from None
    if count > _MOST_VALUES:
        raise InputError(f"{complaint} usable: its aliases stand for {count} values; allowed: {_MOST_VALUES}")
    return value


def _count_values(value: Any, counted: dict[int, int]) -> int:
    """Values in a tree, those of an alias as often as it stands there."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        children = value.values() if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count_values(child, counted) for child in children)
    return counted[id(value)]
