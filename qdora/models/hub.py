"""A model of the Hugging Face hub as a folder on disk, from the cache where it is there."""

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

from qdora.errors import InputError

# Data only: never pickles (.bin, .pt, .pth) and never code (.py).
_ALLOWED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
# Second copies of the same weights, in another layout.
_IGNORED = ("consolidated*.safetensors", "*/*.safetensors")


def is_hub_id(text: str) -> bool:
    """Whether this may name a model of the hub: `owner/name` or `name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def fetch_snapshot(model_id: str, revision: str | None) -> Path:
    """The folder of a hub model, downloaded where the cache does not have it.

    Without a connection (or with HF_HUB_OFFLINE=1) the cached snapshot serves.

    Args:
        model_id: `owner/name`.
        revision: branch, tag or commit; the default branch where None.
    Raises: InputError: no such model or revision, no access, no connection and nothing cached.
    """
    try:
        folder = snapshot_download(
            model_id, revision=revision, allow_patterns=list(_ALLOWED), ignore_patterns=list(_IGNORED)
        )
    except Exception as error:  # network libraries raise errors of their own through this call
        raise InputError(_explain(model_id, revision, error)) from error
    return Path(folder)


def _explain(model_id: str, revision: str | None, error: Exception) -> str:
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
    first_line = (str(error).splitlines() or [""])[0]
    return f"{model_id}: cannot be fetched from the hub: {type(error).__name__}: {first_line}"
