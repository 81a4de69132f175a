"""JSON schemas of the configuration files, from which editors complete keys and show what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qdora.config import RunConfig, Section
from qdora.experiments.arms import CompareConfig
from qdora.experiments.overlay import OverlayConfig

KINDS: dict[str, type[Section]] = {"run": RunConfig, "compare": CompareConfig, "overlay": OverlayConfig}
"""What a file may hold, by the name of its schema."""

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PARTIAL = "Partial"


def json_schema(kind: str) -> dict[str, Any]:
    """The schema of a kind of file; its descriptions are the docstrings of the keys.

    Args:
        kind: a key of `KINDS`.
    """
    tree = _without_titles(KINDS[kind].model_json_schema())
    if kind != "run":
        _set_dotted_keys(tree)
    return {"$schema": _DIALECT, "title": f"qdora {kind}", **tree}


def schema_text(kind: str) -> str:
    """`json_schema` as it is written to a file."""
    return json.dumps(json_schema(kind), indent=1, ensure_ascii=False) + "\n"


def _without_titles(tree: Any) -> Any:
    """Without the names that pydantic makes of keys."""
    if isinstance(tree, list):
        return [_without_titles(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kept = {key: value for key, value in tree.items() if key != "title" or not isinstance(value, str)}
    return {key: _without_titles(value) for key, value in kept.items()}


def _set_dotted_keys(tree: dict[str, Any]) -> None:
    """Let `set` and `sweep` take the dotted keys of a run, and no others."""
    run = _without_titles(RunConfig.model_json_schema())
    sections = json.loads(json.dumps(run["$defs"]).replace("#/$defs/", f"#/$defs/{_PARTIAL}"))
    for section in sections.values():
        section.pop("required", None)
    definitions = tree.setdefault("$defs", {})
    definitions |= {_PARTIAL + name: section for name, section in sections.items()}
    settings = dict(_dotted(json.loads(json.dumps(run["properties"])), run["$defs"], ""))
    text = json.dumps(settings).replace("#/$defs/", f"#/$defs/{_PARTIAL}")
    patterns: dict[str, Any] = {r"^adapter\.(rank|alpha)_pattern\..": {}}  # keys of the user's own
    allowed = {"type": "object", "patternProperties": patterns, "additionalProperties": False}
    definitions["Settings"] = {**allowed, "properties": json.loads(text)}
    lists = {key: {"type": "array", "items": value} for key, value in json.loads(text).items()}
    definitions["Sweep"] = {**allowed, "properties": lists}
    for section in (tree, *(d for name, d in definitions.items() if name == "ArmConfig")):
        for key, kind in (("set", "Settings"), ("sweep", "Sweep")):
            if key in section["properties"]:
                found = section["properties"][key]
                described = {k: found[k] for k in ("description", "default") if k in found}
                reference = {"$ref": f"#/$defs/{kind}"}
                nullable = "anyOf" in found
                section["properties"][key] = described | (
                    {"anyOf": [reference, {"type": "null"}]} if nullable else reference
                )
    arms = tree["properties"]["arms"]
    if "additionalProperties" in arms:  # an overlay's, by globs
        arms["additionalProperties"] = {"$ref": "#/$defs/Settings"}


def _dotted(
    properties: dict[str, Any], definitions: dict[str, Any], prefix: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each key below a section, by its dotted name."""
    for name, value in properties.items():
        yield prefix + name, value
        several = (value, *value.get("anyOf", ()))
        for reference in (*several, *(one for item in several for one in item.get("oneOf", ()))):
            if "$ref" in reference:
                section = definitions[reference["$ref"].rpartition("/")[2]]
                yield from _dotted(section["properties"], definitions, f"{prefix}{name}.")
