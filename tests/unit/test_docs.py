"""Links of the pages, and the site that is built from them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def prose(page: Path) -> str:
    """A page without its code, in which brackets mean something else."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings; a repeated one is numbered."""
    found: dict[str, int] = {}
    for heading in re.findall(r"(?m)^#+ (.*)$", prose(page)):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, times in found.items() for i in range(times)}


def broken(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there, or out of docs/ from inside it."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        outside = ROOT / "docs" in page.parents and ROOT / "docs" not in file.parents
        if outside or not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Catches: a link to a page or heading that was renamed, or to a file that the site does not have."""
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """Catches: a check that passes whatever a page says."""
    page = tmp_path / "page.md"
    page.write_text("# A b-c: d\n## `x/y`\n## A b-c: d\n[1](#a-b-c-d) [2](#a-b-c-d-1) [3](page.md#xy)\n")
    assert broken(page) == []
    page.write_text("# A\n[1](#b) [2](none.md) [3](page.md#c)\n```\n[4](#in-code)\n```\n`[5](#code)`\n")
    assert broken(page) == ["#b", "none.md", "page.md#c"]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Catches: a page that mkdocs renders otherwise than GitHub, a navigation entry without its page, a
    report that is changed or left out, a script or font that a reader's browser asks another host for."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
    for report in (ROOT / "docs").glob("results/*/report.html"):
        assert (tmp_path / report.relative_to(ROOT / "docs")).read_bytes() == report.read_bytes()
    for file in tmp_path.rglob("*.html"):
        html = file.read_text(encoding="utf-8")
        asked = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"(https?:[^\"]*)\"", html)
        assert asked == [], file.name
        paragraphs = re.findall(r"(?s)<p>(.*?)</p>", html)
        assert [p for p in paragraphs if re.search(r"(?m)^(- |\d+\. |\| )", p)] == [], file.name
