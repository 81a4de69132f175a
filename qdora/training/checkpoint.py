"""Training checkpoints: written atomically, verified before use, the newest few kept.

A checkpoint is `checkpoints/step-N/`: state.safetensors (parameters, masters, moments),
state.json (step, settings, SHA-256 of every file) and adapter/ in PEFT's format.
Data order and dropout follow from seed and step, so nothing else is needed to go on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qdora.errors import CheckpointError, InputError
from qdora.files import new_directory, read_json

STATE = "state.safetensors"
FACTS = "state.json"


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    *,
    keep: int,
    save_adapter: Callable[[Path], None],
) -> Path:
    """Write `directory/step-N` whole or not at all, then remove all but the newest `keep`.

    Args:
        step: optimizer steps done.
        tensors: the optimizer's state.
        settings: what a resumed run must agree on.
        save_adapter: writes the adapter into the folder it is given.
    Raises: InputError: no space left, or the folder cannot be written; older checkpoints are intact.
    """
    final = directory / f"step-{step}"
    with new_directory(final) as folder:
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, folder / STATE)
        save_adapter(folder / "adapter")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        facts = {
            "step": step,
            "settings": settings,
            "sha256": {str(path.relative_to(folder)): file_digest(path) for path in files},
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for old in list_checkpoints(directory)[keep:]:
        shutil.rmtree(old)
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoint folders, newest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def load_checkpoint(folder: Path, settings: Mapping[str, Any]) -> tuple[int, dict[str, torch.Tensor]]:
    """A verified checkpoint: its step and the optimizer's state.

    Raises: CheckpointError: a file is missing, truncated or corrupt.
        InputError: it was written under other settings; the first that differs is named.
    """
    try:
        facts = read_json(folder / FACTS)
        for name, expected in facts["sha256"].items():
            got = file_digest(folder / name)
            if got != expected:
                raise CheckpointError(f"{folder / name}: corrupt, its SHA-256 is not the one recorded")
        tensors = load_file(folder / STATE)
        step = int(facts["step"])
        saved = dict(facts["settings"])
        if folder.name[5:].isdigit() and folder.name != f"step-{step}":
            raise CheckpointError(f"{folder / FACTS}: corrupt, it says step {step}")
    except CheckpointError:
        raise
    except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a usable checkpoint: {error}") from None
    _refuse_other_settings(folder, saved, settings)
    return step, tensors


def newest_usable(
    directory: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> tuple[int, dict[str, torch.Tensor]] | None:
    """The newest checkpoint that verifies; each unusable one is named to `warn`. None where there is none.

    Raises: InputError: as `load_checkpoint`, for settings that differ.
    """
    for folder in list_checkpoints(directory):
        try:
            return load_checkpoint(folder, settings)
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_other_settings(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    current = json.loads(json.dumps(current))
    for key in sorted(saved.keys() | current.keys()):
        if saved.get(key) != current.get(key):
            raise InputError(
                f"{folder}: written with {key} = {saved.get(key)!r}, this run has {current.get(key)!r}; "
                f"resume with the same settings"
            )
