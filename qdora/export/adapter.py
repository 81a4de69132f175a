"""`--format adapter`: the adapter alone, in PEFT's format, for others who have its base."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile

from qdora.adapters.saved import CONFIG_FILE, read_saved
from qdora.export.verify import VerificationError
from qdora.files import read_json, write_json
from qdora.models.provenance import CARD_FILE, find_provenance
from qdora.models.sources import MODEL_FILES

_BASE = "base_model_name_or_path"


def copy_adapter(adapter: Path, folder: Path) -> str:
    """Copy an adapter with its tokenizer, where it has one; no pickle, and no card.

    Where its settings name the base by a folder of this machine, its name is left.

    Returns: a sentence on what was written.
    Raises: InputError: as `read_saved`.
        VerificationError: the copy has other tensors.
    """
    before = read_saved(adapter)
    for file in sorted(adapter.iterdir()):
        known = any(fnmatch(file.name, pattern) for pattern in MODEL_FILES)
        if file.is_file() and known and file.name not in (CARD_FILE, CONFIG_FILE):
            copyfile(file, folder / file.name)
    settings = read_json(adapter / CONFIG_FILE)
    if isinstance(named := settings.get(_BASE), str):
        settings[_BASE] = find_provenance(named).name
    write_json(folder / CONFIG_FILE, settings)
    if read_saved(folder).digest != before.digest:
        raise VerificationError(f"{folder}: the copy of {adapter} has other tensors")
    return "adapter"
