"""Configuration files: strict YAML into the models of `qdora/config.py`, and back.

An unknown key, a wrong type or an impossible combination is an `InputError` that names file,
key, what came, what is allowed and the nearest key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, overload

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qdora.config import RunConfig, Section
from qdora.errors import InputError, suggest

C = TypeVar("C", bound=Section)


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


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: type[C]) -> C: ...
def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[Section] = RunConfig) -> Section:
    """Read a YAML file, apply `a.b=c` overrides, and check everything.

    Args:
        path: the YAML file.
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
        details = [_explain(kind, detail) for detail in error.errors()]
        raise InputError(f"{origin}: " + "\n  ".join(details)) from None
    except TypeError as error:
        raise InputError(f"{origin}: a value is not plain YAML ({error})") from None


def dump_config(config: Section) -> str:
    """The fully resolved configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_digest(config: Section) -> str:
    """What tells two configurations apart, in few letters."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises: InputError: missing, unreadable, not YAML or not a mapping.
    """
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
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
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {dotted}: {key!r} holds {child!r}, it has no keys below it")
        node = child
    node[last] = value


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each `a.b=c`, the value in YAML.

    Raises: InputError: an override is not of that form.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override!r}: expected key=value, for example training.max_steps=20")
        try:
            set_key(tree, key.strip(), yaml.load(value, _Loader))
        except yaml.YAMLError as error:
            raise InputError(f"--set {override!r}: the value is not valid YAML: {error}") from None


def _explain(kind: type[Section], detail: ErrorDetails) -> str:
    """One sentence for one pydantic error, with the nearest key for an unknown one."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        section = _section_at(kind, location[:-1])
        hint = suggest(location[-1], section.model_fields)
        return f"unknown key {key!r} (value {detail['input']!r}); {hint}"
    if detail["type"] == "missing":
        return f"key {key!r} is required and missing"
    if detail["type"] == "value_error":
        return f"{key + ': ' if key else ''}{detail['ctx']['error']}"
    if detail["type"] == "literal_error":
        got = str(detail["input"])
        allowed = re.findall(r"'([^']*)'|(\d+)", detail["ctx"]["expected"])
        return f"{key}: got {got!r}; {suggest(got, [a or b for a, b in allowed])}"
    return f"{key}: {detail['msg']}, got {detail['input']!r} ({type(detail['input']).__name__})"


def _section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    for part in location:
        field = kind.model_fields.get(part)
        if field is None:
            continue
        candidates = (field.annotation, *get_args(field.annotation))
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
        if nested:
            kind = nested[0]
    return kind
