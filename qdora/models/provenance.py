"""What may be said in public about a base model: its id on the hub, and the licence that its own files state.

Nothing is asked of the network: a hub model's card lies in the cache beside its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from qdora.errors import InputError, not_installed
from qdora.files import path_exists
from qdora.models.sources import PACKAGED_MODELS, is_hub_id, local_path

CARD_FILE = "README.md"
UNKNOWN = "other"
"""The hub's identifier of a licence that it has no name for."""


@dataclass(frozen=True)
class Provenance:
    """Where a base model comes from.

    Attributes:
        name: without the folders of the machine.
        hub_id: `owner/name`; None where it is not known to be on the hub.
        licence: the hub's identifier, `other` where it is not known.
        licence_name, licence_link: of one that the hub has no identifier for, where its card has them.
        source: what stated the licence; None where nothing did.
    """

    name: str
    hub_id: str | None = None
    licence: str = UNKNOWN
    licence_name: str | None = None
    licence_link: str | None = None
    source: str | None = None


def find_provenance(path_or_id: str, revision: str | None = None) -> Provenance:
    """What is known of a base model, by the name that a configuration has for it.

    Licences come from the base's own card, a GGUF file's metadata, or this project's table of packaged
    models.  A file that cannot be read states none.
    """
    if path_or_id in PACKAGED_MODELS:
        model = PACKAGED_MODELS[path_or_id]
        # SPDX identifiers in small letters are the hub's.
        licence = model.licence.lower()
        return Provenance(path_or_id, model.hub_id, licence, source="its original's page on the hub")
    path = local_path(path_or_id)
    if path_exists(path):
        return _local(path)
    if not is_hub_id(path_or_id):
        return Provenance(path.name)
    card = try_to_load_from_cache(path_or_id, CARD_FILE, revision=revision)
    stated = _of_card(Path(card)) if isinstance(card, str) else {}
    return Provenance(path_or_id, path_or_id, **stated)


def _local(path: Path) -> Provenance:
    name = path.resolve().name
    if path.is_dir():
        return Provenance(name, **_of_card(path / CARD_FILE))
    if not_installed("gguf"):
        return Provenance(name)
    from qdora.models.formats.gguf import GGUFFile  # of an extra

    try:
        metadata = GGUFFile.open(path, str(path)).metadata
    except InputError:
        return Provenance(name)
    keys = {"license": "", "license_name": ".name", "license_link": ".link"}
    stated = {key: metadata.get(f"general.license{end}") for key, end in keys.items()}
    return Provenance(name, **_stated(stated, "the metadata of its GGUF file"))


def _of_card(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # cards are written by hand: of YAML, of encodings, of what stands where
        return {}
    return _stated(data, "its model card")


def _stated(fields: dict[str, Any], source: str) -> dict[str, str]:
    licence = fields.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if not isinstance(licence, str) or not licence.strip():
        return {}
    found = {"licence": licence.strip().lower(), "source": source}
    for key, name in (("license_name", "licence_name"), ("license_link", "licence_link")):
        if isinstance(fields.get(key), str):
            found[name] = fields[key]
    return found
