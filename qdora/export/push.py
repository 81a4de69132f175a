"""A folder onto the Hugging Face hub: refused before the work where that can be, errors in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qdora.errors import InputError
from qdora.export.card import is_unchanged
from qdora.models.provenance import CARD_FILE
from qdora.run import package_versions

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin", "adapter_config.json")
"""A loader that finds such a file of another push beside ours may take it."""


@dataclass(frozen=True)
class Repository:
    """A model repository of the hub that may be written.

    Attributes:
        name: `OWNER/NAME`.
        private: as it is made where it is not there.
    """

    name: str
    private: bool
    api: HfApi

    def push(self, folder: Path) -> str:
        """Upload all files of a folder in one commit, and make the repository where it is not there.

        A card there that this program has not written, or that was edited there, is kept.

        Returns: its address.
        Raises: InputError: the hub refuses, or cannot be reached; weights of another push are there.
        """
        kept = []
        with explained(self.name):
            url = self.api.create_repo(self.name, private=self.private, exist_ok=True)
            there = self.api.list_repo_files(self.name)
            own = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            weights = [name for name in there if any(fnmatch(name, pattern) for pattern in _WEIGHTS)]
            if strangers := sorted(set(weights) - own):
                raise InputError(
                    f"--push-to-hub {self.name}: it holds {', '.join(strangers[:3])}, which would be loaded "
                    f"with the pushed files or in their place: name another repository, or delete it there"
                )
            if CARD_FILE in there and CARD_FILE in own and self._is_edited():
                kept = [CARD_FILE]
            self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                ignore_patterns=list(kept),  # the library adds to it
                commit_message=f"Upload with qdora {package_versions()['qdora']}",
            )
        return f"{url}; its {CARD_FILE} was edited, and is kept as it is there" if kept else str(url)

    def _is_edited(self) -> bool:
        path = Path(self.api.hf_hub_download(self.name, CARD_FILE))
        return not is_unchanged(path.read_text(encoding="utf-8", errors="replace"))


def open_repository(name: str, *, private: bool) -> Repository:
    """Find out before the work whether a repository can be written; nothing is made yet.

    Args:
        name: `OWNER/NAME`, or a name of the user's own.
        private: nobody else may read it.
    Raises: InputError: no such name is possible; there is no token, or it may not write; the hub cannot be
        reached; the repository is public, and `private` was asked for.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"--push-to-hub {name!r}: {str(error).partition(chr(10))[0]}; allowed: OWNER/NAME"
        ) from None
    if get_token() is None:
        raise InputError(
            "--push-to-hub needs an access token of the hub: log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi()
    with explained(name):
        user = api.whoami()
        token = user.get("auth", {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise InputError(
                f"--push-to-hub {name}: the token {token.get('displayName')!r} can only read; make one "
                f"that can write on the hub's page of tokens, then `hf auth login`"
            )
        full = name if "/" in name else f"{user['name']}/{name}"
        try:
            is_public = not api.model_info(full).private
        except RepositoryNotFoundError:
            is_public = False
    if private and is_public:
        raise InputError(
            f"--private: {full} exists and is public; make it private in its settings on the hub, or name "
            f"another"
        )
    return Repository(full, private, api)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what the hub's library raises in the block into one sentence.

    Raises: InputError
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # network libraries raise errors of their own through its calls
        raise InputError(f"--push-to-hub {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is not asked, since HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status, said = error.response.status_code, (error.server_message or "").partition("\n")[0]
        hint = f": {said}" if said else ""
        if status == 401:
            return f"the hub does not accept the token (401){hint}; log in anew with `hf auth login`"
        if status == 403:
            return f"the token may not write there (403){hint}"
        return f"the hub answered {status}{hint}"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {' '.join(lines[:2])}"
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
        return f"the hub at {constants.ENDPOINT} cannot be reached: {reason}"
    return f"it failed: {reason}"
