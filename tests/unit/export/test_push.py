"""Uploads to a small hub of the tests, through huggingface_hub as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from qdora.cli import run_command
from qdora.errors import InputError
from qdora.export.card import write_card
from qdora.export.push import open_repository
from tests.hub import Hub, Repo, running_hub
from tests.unit.export.test_card import card_of, make_run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """What the library reads from HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_XET when it is imported."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with its card."""
    adapter = make_run(tmp_path).adapter
    write_card(adapter, card_of(make_run(tmp_path)))
    return adapter


def test_a_folder_becomes_a_repository(hub: Hub, folder: Path) -> None:
    """Catches: a file that is left out or changed, a public repository where a private one was asked for, a
    card that the hub refuses; a repository made before the work, which may fail."""
    repository = open_repository("ada/sums", private=True)
    assert hub.repos == {}
    assert repository.push(folder) == f"{hub.address}/ada/sums"
    there = hub.repos["ada/sums"]
    assert there.private
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: data for name, data in there.files.items() if name != ".gitattributes"} == own
    assert "POST /api/validate-yaml" in hub.requests
    ModelCard.load(folder / "README.md").validate()


def test_the_users_own_name_space(hub: Hub, folder: Path) -> None:
    """Catches: a name without an owner that ends in the library's ValueError, or elsewhere."""
    assert open_repository("sums", private=False).push(folder) == f"{hub.address}/ada/sums"
    assert not hub.repos["ada/sums"].private


def test_a_second_push_replaces_what_we_wrote(hub: Hub, folder: Path) -> None:
    """Catches: a push that fails where the repository is there; a card that was edited there overwritten."""
    open_repository("ada/sums", private=False).push(folder)
    files = hub.repos["ada/sums"].files
    text = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    write_card(folder, card_of(make_run(folder.parents[1]), title="another"))
    assert "kept" not in open_repository("ada/sums", private=False).push(folder)
    assert b"# another" in files["README.md"]
    files["README.md"] = text.encode() + b"\nMine.\n"
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    said = open_repository("ada/sums", private=False).push(folder)
    assert said.endswith("its README.md was edited, and is kept as it is there")
    assert files["README.md"].endswith(b"Mine.\n")
    assert files["adapter_config.json"] == b'{"peft_type": "LORA"}'


def test_weights_of_another_push_are_not_left_beside_ours(hub: Hub, folder: Path) -> None:
    """Catches: an old model.safetensors that a loader takes for the pushed model's."""
    hub.repos["ada/sums"] = Repo(private=False)
    hub.repos["ada/sums"].files["model-00001-of-00002.safetensors"] = b"old"
    with pytest.raises(InputError, match=r"ada/sums: it holds model-00001-of-00002\.safetensors, .*another"):
        open_repository("ada/sums", private=False).push(folder)
    assert not any("commit" in asked for asked in hub.requests)


def test_private_is_not_silently_public(hub: Hub) -> None:
    """Catches: a model published in a public repository that was thought to be private."""
    hub.repos["ada/sums"] = Repo(private=False)
    with pytest.raises(InputError, match="--private: ada/sums exists and is public"):
        open_repository("ada/sums", private=True)


def test_without_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches: a refusal after the export, or a message that does not say what to do."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="needs an access token of the hub: log in with `hf auth login`"):
        open_repository("ada/sums", private=False)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("whoami", 401, r"the hub does not accept the token \(401\).*hf auth login"),
        ("create", 403, r"the token may not write there \(403\): no rights"),
        ("commit", 500, r"the hub answered 500"),
        ("GET /api/models/ada/sums$", 429, r"the hub answered 429"),
    ],
)
def test_refusals_of_the_hub(hub: Hub, folder: Path, pattern: str, status: int, message: str) -> None:
    """Catches: a traceback of the library for what a user can mend."""
    hub.failures[pattern] = (status, "no rights")
    with pytest.raises(InputError, match=f"^--push-to-hub ada/sums: {message}") as error:
        open_repository("ada/sums", private=False).push(folder)
    assert "\n" not in str(error.value)


def test_a_token_that_can_only_read(hub: Hub) -> None:
    """Catches: 403 after an hour of exporting."""
    hub.role = "read"
    with pytest.raises(InputError, match="the token 'mine' can only read"):
        open_repository("ada/sums", private=False)


def test_a_card_that_the_hub_refuses(hub: Hub, folder: Path) -> None:
    """Catches: the hub's list of errors as a traceback of several lines."""
    (folder / "README.md").write_text("---\nlicense: [1]\n---\n")
    with pytest.raises(
        InputError, match=r"^--push-to-hub ada/sums: .*Invalid metadata in README\.md\. license"
    ):
        open_repository("ada/sums", private=False).push(folder)


@pytest.mark.parametrize("name", ["a/b/c", "ada/", "--x", "ada/a..b"])
def test_names_that_no_repository_has(name: str) -> None:
    """Catches: HFValidationError."""
    with pytest.raises(InputError, match="allowed: OWNER/NAME"):
        open_repository(name, private=False)


def test_no_connection(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """Catches: a traceback of the network library, or the advice to look for a fault of ours."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        open_repository("ada/sums", private=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the hub at http://127\.0\.0\.1:9 cannot be reached"):
        open_repository("ada/sums", private=False)


def test_an_upload_that_fails_leaves_the_export(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: an hour of exporting that is lost, or a traceback, because the hub was busy."""
    run, out = make_run(tmp_path), tmp_path / "out"
    hub.failures["commit"] = (503, "busy")
    words = ["--run", str(run.path), "--format", "adapter", "--output", str(out)]
    assert run_command("export", [*words, "--push-to-hub", "ada/sums"]) == 2
    said = capsys.readouterr().err
    assert "the hub answered 503" in said
    assert f"The folder {out} is complete; `hf upload ada/sums {out}` uploads it" in said
    assert (out / "adapter_model.safetensors").is_file()
    itself = [*words[:-1], str(run.adapter), "--overwrite"]
    assert run_command("export", itself) == 2
    assert "is the adapter itself; name another folder for its copy" in capsys.readouterr().err
    assert run_command("export", [*words, "--private"]) == 2
    assert "--private is about the repository that --push-to-hub names" in capsys.readouterr().err


def test_the_command(hub: Hub, tmp_path: Path) -> None:
    """Catches: an option that the command does not pass on; scores of the run that are not in the card; a
    folder of this machine, or a pickle, in what is published."""
    run = make_run(tmp_path)
    words = ["--run", str(run.path), "--format", "adapter", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "launch/export.py", *words, "--push-to-hub", "sums", "--private"],
        cwd=ROOT,
        env=os.environ
        | {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"adapter: {tmp_path / 'out'}\npushed: {hub.address}/ada/sums\n"
    there = hub.repos["ada/sums"]
    assert there.private
    assert (
        there.files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    )
    assert "optimizer.pt" not in there.files
    published = b"".join(data for name, data in there.files.items() if not name.endswith(".safetensors"))
    assert str(tmp_path).encode() not in published
    card = ModelCard(there.files["README.md"].decode())
    assert card.data.model_name == "ada/sums"
    assert [result.metric_value for result in card.data.eval_results or []] == [0.75, 0.5]
