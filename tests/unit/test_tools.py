"""The scripts behind the figures of the docs, which no other test runs."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT
from tools import scores_picture

FILES = sorted(file for file in (ROOT / "tools").rglob("*.py") if file.name != "__init__.py")
SCRIPTS = [file for file in FILES if '\nif __name__ == "__main__":\n' in file.read_text(encoding="utf-8")]


def name_of(file: Path) -> str:
    """As `python -m` takes it."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


@pytest.mark.filterwarnings("ignore:'tools.* found in sys.modules:RuntimeWarning")  # another one imports it
@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_it_is_imported_and_shows_its_options(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: an import of what a merge renamed or removed, a file beside it that `python -m` does not find,
    options that argparse does not take, a script that begins to measure when asked for its options."""
    # As `python -m` has it: the folder of the file itself is not searched.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != file.parent])
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    name = name_of(file)
    if file not in SCRIPTS:
        importlib.import_module(name)
        return
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_its_own_text_says_how_it_is_run(file: Path) -> None:
    """Catches: a command in a docstring under the former name of the file, or by its path, by which a script
    that imports another one stops."""
    text = file.read_text(encoding="utf-8")
    commands = re.findall(
        r"(?:python|torchrun) [^\n`]*?\btools\b[\w./]*", text.partition("from __future__")[0]
    )
    assert commands
    assert {command.rpartition(" ")[2] for command in commands} == {name_of(file)}, commands
    assert all(" -m tools." in command for command in commands), commands


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "tools"], ids=name_of)
def test_a_page_names_it(file: Path) -> None:
    """Catches: a script that stays after the figures that it measured have left the docs."""
    pages = [*ROOT.glob("*.md"), ROOT / "mkdocs.yml", *(ROOT / "docs").rglob("*.md")]
    named = rf"\btools[./]{file.stem}\b"
    assert any(re.search(named, page.read_text(encoding="utf-8")) for page in pages)


def test_a_page_names_no_script_that_is_not_there() -> None:
    """Catches: a command of the docs whose script was renamed or removed."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = set(re.findall(r"-m (tools(?:\.[a-z_]+)+)", text))
    assert len(found) > 10
    assert found <= {name_of(file) for file in SCRIPTS}
    assert re.findall(r"tools/\w+\.py", text) == []


def test_the_picture_of_the_readme_is_drawn_from_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a drawing that wants what the committed report does not have."""
    report = ROOT / "docs" / "results" / "main-135m" / "report.json"
    monkeypatch.setattr(sys, "argv", ["scores_picture", str(report), str(tmp_path / "new" / "scores.png")])
    scores_picture.main()
    assert (tmp_path / "new" / "scores.png").read_bytes().startswith(b"\x89PNG")
