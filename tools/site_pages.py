"""Hook of mkdocs: pages of the site that are not files under docs/.

README.md, CONTRIBUTING.md and CHANGELOG.md stand above docs/; GitHub shows the decisions as a folder. Pages
under docs/ link to each other only. A comparison's report is the page that `compare` wrote, as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Page of the site by file at the top of the repository."""

DECISIONS = "adr/index.md"

_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


def site_page(text: str) -> str:
    """The text of a file at the top of the repository, its links as they are inside docs/."""
    moved_pages = {**PAGES, "docs/adr": DECISIONS}

    def moved(match: re.Match[str]) -> str:
        path, mark, anchor = match["target"].partition("#")
        return f"]({moved_pages.get(path, path.removeprefix('docs/'))}{mark}{anchor})"

    return _LINK.sub(moved, text)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Link reports as pages of their own; mkdocs calls it."""
    return markdown.replace("/report.md)", "/report.html)")


def decisions_page(folder: Path) -> str:
    """A list of the decision records in a folder, by their titles."""
    lines = ["# Decisions", ""]
    for path in sorted(folder.glob("0*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").removeprefix("ADR ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages; mkdocs calls it."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    pages = {page: site_page((root / name).read_text(encoding="utf-8")) for name, page in PAGES.items()}
    pages[DECISIONS] = decisions_page(docs / "adr")
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files
