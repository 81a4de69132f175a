"""`schema`: what a configuration file may hold, for editors."""

from __future__ import annotations

import sys
from pathlib import Path

from qdora.experiments.schema import schema_text
from qdora.files import write_text


def write_schema(kind: str, output: Path | None) -> None:
    """Write the JSON schema of a kind of file, to standard output where `output` is None."""
    text = schema_text(kind)
    if output is None:
        sys.stdout.write(text)
        return
    write_text(output, text)
    print(f"{output}: name it in the first line of a file:\n# yaml-language-server: $schema={output}")
