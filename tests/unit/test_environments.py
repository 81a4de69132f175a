"""The environments of other readers: when one is built, built anew, or missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests import environments
from tests.environments import ENVIRONMENTS, Environment, NotBuiltError, build, environment_python

SMALL = Environment(("reader==1.0", "helper"))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that build environments in an empty cache; they make a folder, and nothing in it."""
    done: list[list[str]] = []

    def run(command: list[str]) -> None:
        done.append(command)
        if "--clear" in command:
            folder = Path(command[-1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "ready").unlink(missing_ok=True)

    monkeypatch.setattr(environments, "model_cache", lambda: tmp_path / "models")
    monkeypatch.setattr(environments, "_run", run)
    return done


def test_it_is_built_once(commands: list[list[str]]) -> None:
    """Catches: an environment that each test builds."""
    assert build(SMALL) == SMALL.folder / "bin" / "python"
    assert [command[-1] for command in commands] == [str(SMALL.folder), "helper"]
    assert build(SMALL) == build(replace(SMALL, large=True))
    assert len(commands) == 2


@pytest.mark.parametrize(
    "changed",
    [
        replace(SMALL, requirements=("reader==1.0", "helper==2")),
        replace(SMALL, requirements=("reader==1.0",)),
        replace(SMALL, requirements=("reader==1.0",), alone=("helper",)),
        replace(SMALL, removed=("other",)),
    ],
)
def test_it_is_built_anew_where_its_definition_has_changed(
    changed: Environment, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: tests that read with the packages of a former definition, whose folder has the same name; a
    large environment that a test builds for minutes, or one that is called missing although it is there."""
    monkeypatch.setitem(ENVIRONMENTS, "reader", replace(SMALL, large=True))
    said = r"no environment with reader==1\.0: python -m tests\.environments reader"
    with pytest.raises(pytest.skip.Exception, match=said):
        environment_python("reader")
    python = build(SMALL)
    assert environment_python("reader") == str(python)
    commands.clear()

    monkeypatch.setitem(ENVIRONMENTS, "reader", replace(changed, large=True))
    said = r"reader==1\.0, only one of another definition: python -m tests\.environments reader"
    with pytest.raises(pytest.skip.Exception, match=said):
        environment_python("reader")
    assert commands == []
    assert build(changed) == python
    assert commands
    assert environment_python("reader") == str(python)


@pytest.mark.parametrize("before", [None, SMALL])
def test_what_was_not_built_to_its_end_is_not_ready(
    before: Environment | None, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: an environment without its packages that is taken for ready after pip has failed."""
    if before is not None:
        build(before)
    run: Callable[[list[str]], None] = environments._run

    def fails(command: list[str]) -> None:
        if "install" in command:
            raise NotBuiltError("no network")
        run(command)

    monkeypatch.setattr(environments, "_run", fails)
    changed = replace(SMALL, requirements=("reader==1.0", "helper==2"))
    with pytest.raises(NotBuiltError):
        build(changed)
    assert not changed.is_ready
    assert not SMALL.is_ready


def test_no_two_share_a_folder() -> None:
    """Catches: two environments that build each other anew in turn."""
    assert len({environment.folder for environment in ENVIRONMENTS.values()}) == len(ENVIRONMENTS)
