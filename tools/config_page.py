"""Write docs/configuration.md's tables and configs/schema/ from the docstrings of the configuration.

python -m tools.config_page
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from qdora.config import Section
from qdora.experiments.schema import KINDS, schema_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
SCHEMAS = {kind: ROOT / "configs" / "schema" / f"{kind}.json" for kind in KINDS}

_MARKED = re.compile(r"(<!-- keys of (\w+) -->\n).*?(<!-- end of keys -->)", re.DOTALL)
"""A table in the page; what stands between the marks is written."""
_MOST = 2**53
_PLAIN = {"string": "text", "boolean": "boolean", "integer": "integer", "number": "number", "null": "null"}


def sections() -> dict[str, type[Section]]:
    """All sections of all files, by the names of their classes."""
    found: dict[str, type[Section]] = {}
    waiting: list[type[Section]] = list(KINDS.values())
    for kind in waiting:
        found[kind.__name__] = kind
        for field in kind.model_fields.values():
            inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
            new = [c for c in inner if isinstance(c, type) and issubclass(c, Section)]
            waiting += [c for c in new if c.__name__ not in found and c not in waiting]
    return found


def page_text(page: str) -> str:
    """The page with its tables written anew."""
    known = sections()
    return _MARKED.sub(lambda found: found[1] + table(known[found[2]]) + found[3], page)


def table(kind: type[Section]) -> str:
    """The keys of a section."""
    tree = kind.model_json_schema()
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for python_name, field in kind.model_fields.items():
        name = field.alias or python_name
        found = tree["properties"][name]
        default = "required"
        if not field.is_required():
            default = shown_default(field.get_default(call_default_factory=True))
        lines.append(f"| `{name}` | {shown_type(found)} | {default} | {_linked(field.description or '')} |")
    return "\n".join(lines) + "\n"


def _linked(text: str) -> str:
    """A docstring as a cell: pages of docs/ as links, this one as what stands below."""
    text = " ".join(text.split()).replace("|", r"\|")
    text = text.replace(f"docs/{PAGE.name}", "more below")
    text = re.sub(r"\(see (\w+)\)", lambda heading: f"([{heading[1]}](#{heading[1].lower()}))", text)
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", text)


def shown_type(tree: dict[str, Any]) -> str:
    """A type with its bounds, in words."""
    if several := tree.get("anyOf") or tree.get("oneOf"):
        return " or ".join(shown_type(one) for one in several)
    values = tree.get("enum") or ([tree["const"]] if "const" in tree else [])
    if values:
        return ("one of " if len(values) > 1 else "") + ", ".join(f"`{value}`" for value in values)
    if tree.get("type") == "array":
        least = tree.get("minItems")
        items = shown_type(tree.get("items", {})).removeprefix("one of ")
        return f"list of {items}" + (f", at least {least} entries" if least else "")
    if tree.get("type") == "object" and isinstance(tree.get("additionalProperties"), dict):
        return f"mapping to {shown_type(tree['additionalProperties'])}"
    if "type" not in tree or tree["type"] == "object":
        return "mapping" if "$ref" in tree or "type" in tree else "value"
    words = [_PLAIN[tree["type"]]]
    for key, word in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most")):
        if key in tree and tree[key] != _MOST:
            words.append(f"{word} {tree[key]:g}")
    if "exclusiveMaximum" in tree:
        words.append(f"below {tree['exclusiveMaximum']:g}")
    return ", ".join(words)


def shown_default(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, Section):
        return "its keys' defaults"
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return f"`[{', '.join(value)}]`"
    return f"`{json.dumps(value)}`"


def main() -> None:
    """Write the page and the schemas."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    PAGE.write_text(page_text(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for kind, path in SCHEMAS.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(schema_text(kind), encoding="utf-8")


if __name__ == "__main__":
    main()
